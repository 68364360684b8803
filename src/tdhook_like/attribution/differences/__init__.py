"""How differences from a reference pass through functions: the multipliers of DeepLift.

A model is run twice, at the baseline and at the input. Where a function is not linear, the second run
compares what the function was given with what it was given in the first, and puts a surrogate in
place of its result whose gradient is the *multiplier*: of a function f, numbers mᵢ with
``Σᵢ mᵢ (xᵢ − xᵢ⁰) = f(x) − f(x⁰)``. The gradient of the score then is the multiplier of each input.
"""

from tdhook_like.attribution.differences.table import RULES, rule_of
from tdhook_like.attribution.differences.tape import DifferenceRule, Tape

__all__ = ["RULES", "DifferenceRule", "Tape", "rule_of"]
