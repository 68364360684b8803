"""What one reads from attributions: how much of the relevance each key carries.

>>> import torch
>>> from tensordict import TensorDict
>>> from tdhook_like.metrics import key_shares
>>> attributions = {"pole": torch.tensor([[3.0, -3.0]]), "cart": torch.tensor([[2.0]])}
>>> td = TensorDict({"attr": attributions}, [1])
>>> {key: round(summary.share, 2) for key, summary in key_shares(td).summary.items()}
{'pole': 0.75, 'cart': 0.25}
"""

from __future__ import annotations

from tdhook_like.metrics.shares import KeyShares, KeySummary, key_shares

__all__ = ["KeyShares", "KeySummary", "key_shares"]
