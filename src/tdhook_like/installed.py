"""What is on while a model runs: rules, captures, ports, gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.captured import Captured
from tdhook_like.hooks.functional import Functions
from tdhook_like.hooks.installation import Handler, Installation
from tdhook_like.hooks.surrogate import Twice
from tdhook_like.ports import Ports

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["GradientsOn", "installed"]


def installed(
    context: HookContext,
    flow: Flow,
    twice: Twice | None,
    captured: Captured | None,
    of: Callable[[nn.Module], nn.Module],
    functions: Functions | None = None,
    ports: Ports | None = None,
    plain: bool = False,
) -> AbstractContextManager[object]:
    """Rules (and captures, where asked for) on, for this thread and the length of a block.

    Args:
        context: The method and the model.
        flow: What the call's handlers share.
        twice: What lets relevance be differentiated again, where that is asked for.
        captured: Where what flows out of chosen submodules is kept.
        of: From a module to the one that runs in its place.
        functions: A mode that a method without rules brings.
        ports: The submodules whose outputs are read or set.
        plain: Whether rules stay off: for values, which they do not change.
    """
    plan = None if plain else context.plan
    after: dict[int, tuple[nn.Module, Handler]] = {}
    before, closed = {}, []
    if plan is not None:
        if plan.calls_functions or flow.recorder is not None:
            flow.mode = Functions(context.functions.around(flow))
        after, before, closed = plan.hooks(flow, of)
    if captured is not None:
        for path, original in context.captures.items():
            module = of(original)
            rule = after.get(id(module), (module, None))[1]
            explained = context.at is not None and path in context.at.named
            begin = flow.begin if explained and context.method.single_pass else None
            after[id(module)] = (module, captured.handler(path, rule, begin))
    if ports is not None:
        for path, original in ports.modules.items():
            module = of(original)
            rule = after.get(id(module), (module, None))[1]
            after[id(module)] = (module, ports.handler(path, rule))
    mode = functions or (None if plain else flow.mode)
    if not after and not before and mode is None:
        return twice or nullcontext()
    return Installation(
        after.values(),
        before.values(),
        mode,
        closed,
        twice,
        context.scratch,
        keywords=flow.recorder is not None,
    )


class GradientsOn:
    """Gradients on, whatever the caller has set: collectors run under no_grad.

    Args:
        inference: Whether the caller is in inference mode, which is left meanwhile.
    """

    def __init__(self, inference: bool) -> None:
        self._inference = torch.inference_mode(False) if inference else None

    def __enter__(self) -> None:
        if self._inference is not None:
            self._inference.__enter__()
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)

    def __exit__(self, *error: Any) -> None:
        torch._C._set_grad_enabled(self._before)
        if self._inference is not None:
            self._inference.__exit__(*error)
