"""One record per wrong use: what is done wrong, the error that it gives, and what that error says.

``test_bad_input`` tries each of them.
"""

from wrong_uses.baselines import BASELINES, STEPS
from wrong_uses.calls import CONTEXTS, INPUTS
from wrong_uses.meeting import Wrong
from wrong_uses.names import KEYS, PATHS
from wrong_uses.rules import RULES
from wrong_uses.targets import TARGETS

__all__ = ["WRONG_USES", "Wrong"]

WRONG_USES: list[Wrong] = [
    *KEYS,
    *PATHS,
    *TARGETS,
    *INPUTS,
    *CONTEXTS,
    *RULES,
    *BASELINES,
    *STEPS,
]
