"""A layer that is run again with other parameters, and the rules that read one so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tdhook_like.attribution.lrp.modifiers import effective_parameters, with_parameters
from tdhook_like.attribution.lrp.rules.as_is import single_input
from tdhook_like.attribution.lrp.rules.parameters import (
    ZeroParams,
    can_be_asked,
    parameter_names,
    refuse_nonfinite,
    running_again,
    why_not_zeroed,
)
from tdhook_like.attribution.lrp.rules.rule import Inputs, Rule
from tdhook_like.attribution.lrp.rules.stabilizer import Stabilizing, checked, ratio_by
from tdhook_like.errors import RuleError

__all__ = ["Change", "LayerRun", "WeightRule", "known_nonnegative"]

Change = Callable[[Tensor], Tensor]
"""From a parameter to what stands in its place."""

_NOT_AFFINE = (
    *(_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm),
    *(nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag, nn.PReLU, nn.Bilinear),
)


class LayerRun:
    """One call of a layer, which may be repeated with other parameters: ``run(x, w, b)``.

    Attributes:
        module: The layer; it is only read.
        parameters: Its effective parameters by name, without a graph.
    """

    def __init__(self, rule: WeightRule, module: nn.Module, inputs: Inputs, x: Tensor) -> None:
        self.module, self.parameters = module, effective_parameters(module)
        refuse_nonfinite(rule, module, self.parameters)
        self._rule, self._inputs, self._x = rule, inputs, x

    def __call__(self, value: Tensor, weight: Change, bias: Change | None) -> Tensor:
        """What the layer gives for ``value``.

        Args:
            value: In the place of the input.
            weight: What becomes of every parameter that is not the bias.
            bias: What becomes of the bias; None for no bias.
        """
        changed: dict[str, Tensor | None] = {}
        for name, p in self.parameters.items():
            change = bias if name == "bias" else weight
            zero = name in self._rule.zero_params
            changed[name] = torch.zeros_like(p) if zero and change else change and change(p)
        args = [value if item is self._x else item for item in self._inputs]
        kwargs = {k: value if item is self._x else item for k, item in self._inputs.kwargs.items()}
        with running_again(self.module):
            return with_parameters(self.module, changed).forward(*args, **kwargs)

    def ratio(self, y: Tensor, z: Tensor) -> Tensor:
        """``nonzero(y) / st(z)`` by the rule's stabiliser; no graph."""
        return ratio_by(self._rule.stabilizer, y, z, self.module)

    def scaled(self, z: Tensor, y: Tensor) -> Tensor:
        """``z · G(y / st(z))``: shares relevance by the parts of z, and scales it to y."""
        return z * self.ratio(y, z)


class WeightRule(Rule):
    """A rule on a layer with weights of its own: one input, one output. Override :meth:`share`.

    Args:
        stabilizer: Added to the size of every denominator, in units of the output; or a
            :class:`Stabilizer`.
        zero_params: Names of the parameters that are read as zeros, whatever else becomes of them.

    Raises:
        RuleError: If the stabiliser is neither a finite number above zero nor a stabiliser.
    """

    feeds_zeros = False
    fresh = True
    #: Names of the parameters that are read as zeros.
    zero_params: tuple[str, ...] = ()

    def __init__(self, stabilizer: Stabilizing = 1e-6, *, zero_params: ZeroParams = ()) -> None:
        self.stabilizer = checked("stabilizer", stabilizer, type(self).__name__)
        if names := parameter_names(zero_params, type(self).__name__):  # else it does not show
            self.zero_params = names

    def check(self, module: nn.Module) -> str | None:
        children = [name for name in module._modules if name != "parametrizations"]
        if children:
            return (
                "it reads a layer with other weights, and this is a container of "
                f"{len(children)} modules. Put it on the layers inside, or use EpsilonRule here."
            )
        if isinstance(module, _NOT_AFFINE):
            return (
                "its output is not a weighted sum of its input alone: statistics, states or indices "
                "take part. Use PassRule, LayerNormRule or EpsilonRule."
            )
        own = any(value is not None for value in module._parameters.values())
        if not own and not isinstance(getattr(module, "weight", None), Tensor):
            return "it reads a layer with other weights, and this has none. Use PassRule or EpsilonRule."
        return why_not_zeroed(module, self.zero_params)

    def surrogate(self, module: nn.Module, inputs: Inputs, output: Any) -> Any:
        reason = self.check(module)
        if reason or not isinstance(output, Tensor):
            reason = reason or f"it returns a {type(output).__name__}, not a tensor."
            raise RuleError(f"{self!r} cannot sit on {type(module).__name__}: {reason}")
        x = single_input(self, module, inputs)
        return self.share(LayerRun(self, module, inputs, x), x, output)

    def share(self, run: LayerRun, x: Tensor, y: Tensor) -> Tensor:
        """The surrogate.

        Args:
            run: The layer with other parameters, ``run(x, change of weights, change of bias)``.
            x: Its input, connected to the graph.
            y: Its output.
        """
        raise RuleError(f"{type(self).__name__} must override share(run, x, y).")


def known_nonnegative(x: Tensor) -> bool:
    """Whether no entry is negative, where that can be asked without breaking a trace.

    Under vmap, grad transforms, compilation and CUDA graphs it cannot, and the answer is no.
    """
    if not can_be_asked(x):
        return False
    # Its least entry, not a comparison of all: several times as fast. NaN is not known to be.
    return not x.numel() or x.detach().min().item() >= 0
