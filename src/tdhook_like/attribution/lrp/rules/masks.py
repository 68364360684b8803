"""Concepts: relevance that passes by some channels of a submodule and by no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.rules.as_is import PassRule
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule
from tdhook_like.errors import RuleError, listed

__all__ = ["MaskRule"]


class MaskRule(Rule):
    """Concept-conditional relevance: at a submodule's output, only some channels pass relevance on.

    The surrogate of ``rule`` times the mask. What arrives at other channels is absorbed; what passes
    is shared out by ``rule``, or follows the module's own gradient. Conserves, of what the mask lets
    pass, what ``rule`` conserves. As any rule it goes with every mapper:
    ``EpsilonPlus(rule_mapper=lambda name, m: MaskRule(3, ZPlusRule()) if name == "conv" else None)``.

    Source: Achtibat et al. 2023 (conditional relevance propagation, CRP).

    Args:
        channels: The channels that pass: an index, a sequence of indices or an integer tensor of
            them. Or a mask, as a boolean or floating-point tensor: of one dimension it has one entry
            per channel, of more it broadcasts to the output.
        rule: How relevance goes on from there; the module's own gradient if None.
        dim: The channels' dimension. Count from the end (-3 for images) where the number of batch
            dimensions varies or the model runs under vmap.

    Raises:
        RuleError: If the channels are neither; at the call, if the output does not have them.

    >>> MaskRule([0, 2])
    MaskRule(channels=(0, 2), rule=None, dim=1)
    """

    fresh = True
    absorbs = "mask"

    def __init__(
        self,
        channels: int | Sequence[int] | Tensor,
        rule: Rule | None = None,
        dim: int = 1,
    ) -> None:
        self.channels = _checked(channels)
        if rule is not None and not isinstance(rule, Rule):
            raise RuleError(f"MaskRule: rule must be a Rule instance or None, got {rule!r}.")
        if type(dim) is not int:
            raise RuleError(f"MaskRule: dim must be a whole number, got {dim!r}.")
        self.rule, self.dim = rule, dim

    @property
    def feeds_zeros(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the rule inside may give relevance to inputs that are exactly zero."""
        # What a pass rule does at zeros depends on its module: the plan cannot see it in here.
        return self.rule is not None and (self.rule.feeds_zeros or isinstance(self.rule, PassRule))

    def check(self, module: nn.Module) -> str | None:
        return None if self.rule is None else self.rule.check(module)

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise RuleError(
                f"{self!r} on {type(module).__name__}: it masks one tensor, and this returns a "
                f"{type(output).__name__}. Put it on the module inside that makes the channels."
            )
        shared = None if self.rule is None else self.rule.surrogate(module, inputs, output)
        return (output if shared is None else shared) * self._mask(module, output)

    def _mask(self, module: nn.Module, output: Tensor) -> Tensor:
        mask, shape = self.channels, tuple(output.shape)
        if isinstance(mask, Tensor) and mask.dim() > 1:
            try:
                return mask.to(output).expand(shape)
            except RuntimeError:
                self._refuse(
                    module, f"a mask of shape {tuple(mask.shape)} does not broadcast", shape
                )
        if not -len(shape) <= self.dim < len(shape):
            self._refuse(module, f"there is no dimension {self.dim}", shape)
        count, behind = shape[self.dim], len(shape) - 1 - self.dim % len(shape)
        if isinstance(mask, Tensor):
            if len(mask) != count:
                self._refuse(
                    module, f"a mask of {len(mask)} entries has not one per channel", shape
                )
            mask = mask.to(output)
        else:
            wrong = [c for c in mask if not -count <= c < count]
            if wrong:
                self._refuse(module, f"there is no channel {listed(wrong)}", shape)
            kept = {c % count for c in mask}
            passes = [float(c in kept) for c in range(count)]
            mask = torch.tensor(passes, dtype=output.dtype, device=output.device)
        return mask.reshape(count, *(1 for _ in range(behind)))

    def _refuse(self, module: nn.Module, what: str, shape: tuple[int, ...]) -> None:
        raise RuleError(
            f"{type(self).__name__} on {type(module).__name__}: {what}: its output has shape {shape}, "
            f"and channels are counted along dimension {self.dim}."
        )


def _checked(channels: Any) -> tuple[int, ...] | Tensor:
    """Indices as a tuple, a mask as a tensor without a graph, or a :class:`RuleError`."""
    if isinstance(channels, Tensor):
        if channels.is_floating_point() or channels.dtype == torch.bool:
            if channels.dim() and torch.isfinite(channels).all():
                return channels.detach()
            raise RuleError(f"MaskRule: a mask has a dimension and is finite, got {channels!r}.")
        channels = channels.tolist() if not channels.is_complex() else None
    indices = (channels,) if isinstance(channels, int) else channels
    if (
        not isinstance(indices, Sequence)
        or not indices
        or not all(isinstance(c, int) and not isinstance(c, bool) for c in indices)
    ):
        raise RuleError(
            "MaskRule: channels must be an index, several of them, or a boolean or floating-point "
            f"mask, got {channels!r}."
        )
    return tuple(indices)
