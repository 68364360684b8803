"""Function rules of normalisation layers."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdhook_like.attribution.lrp.batchnorm import behind, scale_and_shift
from tdhook_like.attribution.lrp.flow import Flow, Made
from tdhook_like.attribution.lrp.functions.operations import FunctionRule
from tdhook_like.attribution.lrp.rules.normalised import batch_norm

__all__ = ["BatchNormalised", "Normalised"]


class Normalised(FunctionRule):
    """A normalisation with its statistics held constant. Conserves what the bias does not absorb.

    Source: Ali et al. 2022, eq. 10; Achtibat et al. 2024, proposition 3.4.

    Args:
        linear: From flow, output and the arguments as in ``torch.nn.functional`` to the normalisation,
            linear in the input; None for the function's own gradient.
    """

    fresh = True
    absorbs = "bias"

    def __init__(self, linear: Callable[..., Tensor | None]) -> None:
        self._linear = linear

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(func, types.FunctionType) or name not in _IN_ANOTHER_ORDER:
            return super().call(flow, name, func, args, kwargs)
        named = dict(zip(_IN_ANOTHER_ORDER[name], args, strict=False)) | kwargs
        cudnn = named.pop("cudnn_enabled")
        again = lambda **given: func(**given, cudnn_enabled=cudnn)  # noqa: E731
        return super().call(flow, name, again, (), named)

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return self._linear(flow, output, *args, **kwargs)


class BatchNormalised(Normalised):
    """Batch normalisation: part of the layer whose output it is called with, else affine.

    Source: Hui & Binder 2019, section 3; see :class:`BatchNormRule`.
    """

    fresh = True

    def __init__(self) -> None:
        super().__init__(batch_norm)

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        given = dict(zip(_ORDER, args, strict=False)) | kwargs
        if _by_batch(given):
            return batch_norm(flow, output, **{**given, "training": True})
        return behind(flow, given["input"], output, *_scale_and_shift(given))

    def finished(self, flow: Flow, result: Tensor, args: Any, kwargs: Any) -> None:
        given = dict(zip(_ORDER, args, strict=False)) | kwargs
        x = given["input"]
        if not isinstance(flow.origin(x), Made) and not _by_batch(given):
            flow.normalised(result, x, *_scale_and_shift(given))


_ORDER = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
#: torch.batch_norm and torch.instance_norm take weights ahead of statistics.
_WEIGHTS_FIRST = ("input", "weight", "bias", "running_mean", "running_var")
_IN_ANOTHER_ORDER = {
    "batch_norm": (*_WEIGHTS_FIRST, "training", "momentum", "eps", "cudnn_enabled"),
    "instance_norm": (*_WEIGHTS_FIRST, "use_input_stats", "momentum", "eps", "cudnn_enabled"),
}


def _by_batch(given: dict[str, Any]) -> bool:
    """Whether the statistics are those of the batch."""
    return bool(given.get("training")) or given["running_mean"] is None


def _scale_and_shift(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mean, variance, eps = given["running_mean"], given["running_var"], given.get("eps", 1e-5)
    return scale_and_shift(mean, variance, given.get("weight"), given.get("bias"), eps)
