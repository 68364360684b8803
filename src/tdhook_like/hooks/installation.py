"""Rules on for one call, in one thread, without touching the model.

torch lets a process register *global* forward hooks, which see every module's call. One such hook
is registered for the length of a call; it looks the called module up by identity and answers only
in the thread that installed it. So no submodule carries a hook, not even during the call; other
threads' calls, and other contexts on the same model, see nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_forward_hooks_always_called,
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from tdhook_like.hooks.functional import Functions
from tdhook_like.hooks.scratch import Scratch
from tdhook_like.hooks.surrogate import Twice

__all__ = ["Handler", "Installation"]

Handler = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""Called as ``handler(module, args, kwargs, output)``; a result other than None replaces output."""

Before = Callable[..., Any]
"""Called as ``before(module, args)`` ahead of the module's forward; may give other arguments. With
``keywords``: as ``before(module, args, kwargs)``, and may give a pair of both."""


class Installation:
    """Handlers on the calls of given modules, for the calling thread, while the block lasts.

    Args:
        after: Modules and their handlers, which see their module's calls once they have returned.
            (Pairs, not a mapping: a user's module may define equality.)
        before: Likewise, called ahead of them; positional arguments that they give take the place of
            the call's.
        functions: A mode for operations without a module, to be active meanwhile.
        closed: Modules that answer for everything inside them: the mode is off there.
        twice: What lets relevance be differentiated again, where that is asked for.
        keywords: Whether handlers ahead see keyword arguments. torch shows these only to hooks on the
            module itself, which then carries one for the length of the block.
        scratch: Where temporaries are borrowed from.

    >>> net = nn.Linear(2, 2)
    >>> def to_zero(module, args, kwargs, output):
    ...     return output * 0
    >>> with Installation([(net, to_zero)]):
    ...     net(torch.ones(2)).tolist()
    [0.0, 0.0]
    >>> net._forward_hooks
    OrderedDict()
    """

    def __init__(
        self,
        after: Iterable[tuple[nn.Module, Handler]],
        before: Iterable[tuple[nn.Module, Before]] = (),
        functions: Functions | None = None,
        closed: Iterable[nn.Module] = (),
        twice: Twice | None = None,
        scratch: Scratch | None = None,
        *,
        keywords: bool = False,
    ) -> None:
        # The pairs are kept, and so are the modules alive and their identities valid.
        self._after = {id(pair[0]): pair for pair in after}
        self._before = {id(pair[0]): pair for pair in before}
        self._functions, self._entered = functions, False
        self._closed = {id(module): module for module in closed} if functions is not None else {}
        self._twice, self._keywords = twice, keywords
        # What is differentiated again must not be overwritten by the next call.
        self._loan = Scratch.none() if scratch is None or twice is not None else scratch.loan()
        self._lent = False
        self._handles: list[Any] = []

    def __enter__(self) -> Installation:
        owner = threading.get_ident()
        after, before, closed = self._after, self._before, self._closed
        functions, keywords = self._functions, self._keywords

        def answer(module: nn.Module, args: Any, *rest: Any) -> Any:
            found = after.get(id(module))
            if found is None or not _mine(owner):
                return None
            # Removal in another thread may come between torch's look at the hooks and this call, in
            # which case torch leaves the keyword arguments out.
            kwargs, output = rest if len(rest) == 2 else ({}, rest[0])
            return found[1](module, args, kwargs, output)

        def ahead(module: nn.Module, args: Any) -> Any:
            if functions is not None and id(module) in closed and _mine(owner):
                functions.inside += 1
            found = None if keywords else before.get(id(module))
            return None if found is None or not _mine(owner) else found[1](module, args)

        def ahead_of_all(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return before[id(module)][1](module, args, kwargs) if _mine(owner) else None

        def left(module: nn.Module, *rest: Any) -> None:
            if functions is not None and id(module) in closed and _mine(owner):
                functions.inside -= 1

        try:
            self._loan.__enter__()
            self._lent = True
            if self._twice is not None:
                self._twice.__enter__()
            if functions is not None:
                functions.__enter__()
                self._entered = True
            if after:
                self._handles.append(register_module_forward_hook(answer, with_kwargs=True))
            if before or closed:
                self._handles.append(register_module_forward_pre_hook(ahead))
            if keywords:
                for module, _ in before.values():
                    hook = module.register_forward_pre_hook(ahead_of_all, with_kwargs=True)
                    self._handles.append(hook)
            if closed:
                # Behind the rules, which are not seen by the mode either; also if forward raises.
                self._handles.append(register_module_forward_hook(left, always_call=True))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            handle = self._handles.pop()
            handle.remove()
            # torch leaves the flags behind.
            _global_forward_hooks_with_kwargs.pop(handle.id, None)
            _global_forward_hooks_always_called.pop(handle.id, None)
        if self._functions is not None and self._entered:
            self._entered = False
            self._functions.__exit__(kind, error, trace)
            self._functions.close()
        if self._twice is not None:
            self._twice.__exit__()
        if self._lent:
            self._lent = False
            self._loan.__exit__()


def _mine(owner: int) -> bool:
    # A compiled region runs in the thread that installed it, and cannot ask for its name.
    return threading.get_ident() == owner or torch.compiler.is_compiling()
