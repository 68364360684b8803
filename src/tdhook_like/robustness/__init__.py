"""How small a change of which key makes the policy do something else?

>>> import torch
>>> from tensordict import TensorDict
>>> from tdhook_like.robustness import FGSM, Lead, perturbed
>>> net = torch.nn.Linear(2, 2, bias=False)
>>> _ = torch.nn.init.eye_(net.weight)
>>> attack = FGSM(Lead("logits"), epsilon=0.5)
>>> with attack.prepare(net, in_keys=["x"], out_keys=["logits"]) as hooked:
...     td = hooked.observe(TensorDict({"x": torch.tensor([[1.0, 0.5]])}, [1]))
>>> perturbed(td)["x"], td["adversarial_score"]  # the lead of what was chosen is gone
(tensor([[0.5000, 1.0000]]), tensor([-0.5000]))
"""

from tdhook_like.robustness.attacks import FGSM, PGD
from tdhook_like.robustness.change import Change, perturbed
from tdhook_like.robustness.comparison import AttackComparator, Comparison
from tdhook_like.robustness.corruptions import Corruption, GaussianNoise
from tdhook_like.robustness.lead import Lead
from tdhook_like.robustness.smallest import MinParamPerturbation

__all__ = [
    "FGSM",
    "PGD",
    "AttackComparator",
    "Change",
    "Comparison",
    "Corruption",
    "GaussianNoise",
    "Lead",
    "MinParamPerturbation",
    "perturbed",
]
