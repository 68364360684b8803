"""One record per family of torchrl modules: how to build it, what to feed it, what to expect.

``test_torchrl_families`` runs every claim over every record. A record's ``score`` is the number
that is explained, spelled out with plain torch on the outputs of a plain call: it knows nothing of
targets, so it is what targets are compared with.
"""

from torchrl_records.agents import AGENT_FAMILIES
from torchrl_records.family import Family
from torchrl_records.policies import POLICIES
from torchrl_records.sequences import SEQUENCES
from torchrl_records.values import VALUES

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {**POLICIES, **VALUES, **SEQUENCES, **AGENT_FAMILIES}
