"""What one reads from attributions, and how good they are.

How much of the relevance each key carries:

>>> import torch
>>> from tensordict import TensorDict
>>> from tdhook_like.metrics import key_shares
>>> attributions = {"pole": torch.tensor([[3.0, -3.0]]), "cart": torch.tensor([[2.0]])}
>>> td = TensorDict({"attr": attributions}, [1])
>>> {key: round(summary.share, 2) for key, summary in key_shares(td).summary.items()}
{'pole': 0.75, 'cart': 0.25}

A measure of a method is prepared and called like the method itself:

>>> from tdhook_like import InputXGradient
>>> from tdhook_like.metrics import Infidelity
>>> net = torch.nn.Linear(2, 1)
>>> with Infidelity(InputXGradient("y")).prepare(net, ["x"], ["y"]) as hooked:
...     td = hooked.observe(TensorDict({"x": torch.randn(3, 2)}, [3]))
>>> td["infidelity"].shape, td["attr", "x"].shape
(torch.Size([3]), torch.Size([3, 2]))
"""

from __future__ import annotations

from tdhook_like.metrics.agreement import Agreement, permutation_agreement
from tdhook_like.metrics.curves import Deletion, Insertion, area
from tdhook_like.metrics.environment import Hiding, Returns, returns_when_hidden
from tdhook_like.metrics.faithfulness import Completeness, Infidelity, Noise, Removal
from tdhook_like.metrics.given import Given
from tdhook_like.metrics.parts import per_channel, per_head, per_token
from tdhook_like.metrics.randomisation import Randomisation, parameter_randomisation
from tdhook_like.metrics.ranks import spearman
from tdhook_like.metrics.sensitivity import MaxSensitivity
from tdhook_like.metrics.shares import KeyShares, KeySummary, key_shares

__all__ = [
    "Agreement",
    "Completeness",
    "Deletion",
    "Given",
    "Hiding",
    "Infidelity",
    "Insertion",
    "KeyShares",
    "KeySummary",
    "MaxSensitivity",
    "Noise",
    "Randomisation",
    "Removal",
    "Returns",
    "area",
    "key_shares",
    "parameter_randomisation",
    "per_channel",
    "per_head",
    "per_token",
    "permutation_agreement",
    "returns_when_hidden",
    "spearman",
]
