"""A layer's rule, made only if relevance arrives at the layer's own output.

Where a normalisation is read as part of the layer in front of it, relevance goes straight from the
normalisation to the layer's input, and the layer's own surrogate, which may run the layer a second
time, would be made for nothing. Whether relevance arrives is known in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.rules.layers import WeightRule
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule
from tdhook_like.hooks.arrival import delayed
from tdhook_like.hooks.surrogate import differentiated_again

__all__ = ["deferred"]


def deferred(
    rule: Rule, flow: Flow, module: nn.Module, inputs: Inputs, output: Tensor, watch: Any
) -> Any:
    """As ``rule.apply(module, inputs, output, watch)``, made at need where that saves work.

    At once where somebody watches, where relevance is to be differentiated again, and inside
    function transforms; and for rules that do not run the layer again.
    """
    factor = rule.factor(module, output) if watch is None else None
    if factor is not None:
        return delayed(output, factor)
    flowing = inputs.attributed
    later = isinstance(rule, WeightRule) and watch is None and len(flowing) == 1
    if not later or torch.compiler.is_compiling() or differentiated_again():
        return rule.apply(module, inputs, output, watch)
    if torch._C._functorch.is_functorch_wrapped_tensor(output):  # pyright: ignore[reportAttributeAccessIssue]
        return rule.apply(module, inputs, output, watch)
    return _Deferred.apply(flowing[0], _Job(rule, flow, module, inputs, output))


class _Job:
    """A rule to be applied."""

    def __init__(
        self, rule: Rule, flow: Flow, module: nn.Module, inputs: Inputs, output: Tensor
    ) -> None:
        self._rule, self._flow, self._module = rule, flow, module
        self._inputs, self.output = inputs, output
        self._found: Tensor | None = None

    def surrogate(self) -> Tensor:
        """The rule's surrogate; made once."""
        if self._found is not None:
            return self._found
        mode = self._flow.mode
        if mode is not None:
            mode.inside += 1  # what a rule calls has no rule
        try:
            with torch.enable_grad():
                found = self._rule.apply(self._module, self._inputs, self.output)
        finally:
            if mode is not None:
                mode.inside -= 1
        found = self.output if found is None else found
        self._found = found
        return found


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, job: _Job) -> Tensor:
        ctx.x, ctx.job = x, job
        return job.output.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore
        (found,) = torch.autograd.grad(
            ctx.job.surrogate(), ctx.x, grad, retain_graph=True, allow_unused=True
        )
        return found, None
