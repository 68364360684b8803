"""Function rules of softmax and of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.functions.operations import FunctionRule
from tdhook_like.attribution.lrp.functions.products import shared
from tdhook_like.hooks.surrogate import attach, constant, differentiated_again

__all__ = ["Attention", "Softmax"]


class Softmax(FunctionRule):
    """Softmax: its gradient is AttnLRP's rule in this signal; or constant, as in CP-LRP.

    Its relatives (``log_softmax``, ``logsumexp``) are expanded at the point likewise, to first
    order; what the expansion does not explain is absorbed.

    Source: Achtibat et al. 2024, eq. 13; Ali et al. 2022, eq. 9, where constant.

    Args:
        fixed: Whether it is held constant.
    """

    absorbs = "softmax"

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed

    def surrogate(self, flow: Flow, output: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return constant(output) if self.fixed else None


class Attention(FunctionRule):
    """Scaled dot-product attention as the two products and the softmax that it is made of.

    Queries and keys share what reaches the weights, weights and values share what reaches the
    output. In terms of the operands' gradients: a quarter, a quarter and a half, without a second
    evaluation. A mask that depends on the inputs is a summand beside queries and keys. Held
    constant, the weights pass nothing.

    Source: Achtibat et al. 2024, section 3.3; Ali et al. 2022, eq. 9, where constant.

    Args:
        fixed: Whether the attention weights are constant.
    """

    absorbs = "softmax"

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed

    def call(self, flow: Flow, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        given: dict[str, Any] = dict(zip(_ARGUMENTS, args, strict=False))
        rest = args[len(given) :]
        given.update({key: kwargs[key] for key in _ARGUMENTS if key in kwargs})
        others = {key: value for key, value in kwargs.items() if key not in given}
        flows = [key for key in given if flow.depends(given[key])]
        if not flows:
            return func(*args, **kwargs)
        flow.applied[name] += 1
        if flow.recorder is not None:
            given = flow.recorder.function_reads(given, flow)
        share = self._shares(flows)
        for key in flows:
            if share[key] == 0:
                given[key] = constant(given[key])
            elif share[key] != 1:
                given[key] = shared(given[key], share[key])
        mask = given.pop("attn_mask", None)
        output = func(*given.values(), mask, *rest, **others)
        if differentiated_again() and not _dropped(*rest, **others):
            # torch's own kernels can be differentiated once.
            q, k, v = given.values()
            output = attach(output, _written_out(q, k, v, mask, *rest, **others))
        if flow.recorder is not None:
            output = flow.recorder.function_gives(name, self, output)
        return output

    def _shares(self, flows: list[str]) -> dict[str, float]:
        if self.fixed:
            return {"query": 0.0, "key": 0.0, "attn_mask": 0.0, "value": 1.0}
        weights = len(flows) > ("value" in flows)
        ours = 0.5 if "value" in flows else 1.0
        each = ours / 2 if "query" in flows and "key" in flows else ours
        value = 0.5 if weights else 1.0
        return {"query": each, "key": each, "attn_mask": ours, "value": value}


_ARGUMENTS: tuple[str, ...] = ("query", "key", "value", "attn_mask")


def _dropped(dropout_p: float = 0.0, *rest: Any, **others: Any) -> bool:
    """Whether weights are dropped at random, which nothing can repeat."""
    return dropout_p > 0


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention of the same value, of operations that can be differentiated twice."""
    if options.get("enable_gqa"):
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, -3) for t in (key, value))
    scale = options.get("scale")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
