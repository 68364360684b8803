"""What is explained: one number per batch element, named without ambiguity.

A target is an immutable description. ``bind`` fixes what must not move while inputs are varied (which
action was taken, which one is greedy) at the outputs of the call that is explained, and gives a
function from outputs to numbers.

The grammar, from short to long:

============================================  =====================================================
``"state_value"``                             an output that is one number per element
``("logits", 2)``, ``("loc", ..., 0)``        a key, then an index into its feature dimensions
``Taken("logits")``                           the entry of the action that stands in the TensorDict
``Greedy("logits")``                          the entry of the greedy action
``LogProb()``                                 log-probability of that action, the action held fixed
``Taken("logits") - ("logits", 0)``           a contrast; ``.against_rest()`` for "all others"
``lambda td: …``                              any function of the outputs
``Each("logits")``                            every entry as its own target
``AtStep(("logits", 2), -1)``                 one time step of a recurrent model over ``[*B, time]``
``Unit("net.0", 3)``, ``Channel("conv", 2)``  a neuron or channel inside the model
``{"left": …, "right": …}``                   several named targets from one forward
============================================  =====================================================
"""

from tdhook_like.targets.base import Pick, Reference, Target
from tdhook_like.targets.composed import (
    AtStep,
    Contrast,
    Each,
    Function,
    TargetSpec,
    as_target,
    as_targets,
    columns,
)
from tdhook_like.targets.entries import Greedy, Output, Taken
from tdhook_like.targets.log_prob import LogProb
from tdhook_like.targets.units import Channel, Unit

__all__ = [
    "AtStep",
    "Channel",
    "Contrast",
    "Each",
    "Function",
    "Greedy",
    "LogProb",
    "Output",
    "Pick",
    "Reference",
    "Taken",
    "Target",
    "TargetSpec",
    "Unit",
    "as_target",
    "as_targets",
    "columns",
]
