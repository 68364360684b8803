"""Each key's share of the relevance, logged while a torchrl Trainer trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from torch import nn
from torchrl.trainers import Trainer, TrainerHookBase

from tdhook_like.errors import InputError
from tdhook_like.rl.observer import Explains, LoggedShares, Observer

__all__ = ["AttributionHook"]


class AttributionHook(TrainerHookBase):
    """Logs what share of the absolute relevance each key carries, every so many optimisation steps.

    ``hook.register(trainer)`` puts it at ``post_optim_log``. It is given the batch of every
    optimisation step and observes the model on every ``interval``-th of them, beginning with the
    first; on the others it returns None. The batch is left as it is, and so are the model, its
    buffers and the random numbers: training goes on, bit for bit, as it would without the hook.

    Args:
        explains: A method, and the module beside it; or a hooked module, or the context of one.
            Give the module that is trained: its weights are read at the time.
        module: What is explained, where ``explains`` is a method.
        interval: Optimisation steps from one observation to the next.
        prefix: Names are ``"<prefix>/<key>/share"``, with the target's name before the key where
            there are several targets.
        statistics: Which of ``"share"``, ``"relevance"``, ``"absolute"`` and ``"first"`` are
            logged, each with its bootstrap interval as ``_low`` and ``_high``.
        max_rows: At most so many rows of the batch are explained.
        n_resamples: Resamples of the bootstrap.
        log_pbar: Whether the trainer's progress bar shows the values.

    Raises:
        ContextError: If a module is missing or given twice.
        InputError: If an option makes no sense.
        TdhookLikeError: As :meth:`Method.prepare` does.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> from torchrl.modules import ValueOperator
    >>> from tdhook_like import InputXGradient
    >>> critic = ValueOperator(nn.Linear(3, 1), in_keys=["observation"])
    >>> hook = AttributionHook(InputXGradient(), critic, interval=2)
    >>> batch = TensorDict({"observation": torch.randn(32, 3)}, [32])
    >>> hook(batch)["attr/observation/share"], hook(batch), sorted(batch.keys())
    (1.0, None, ['observation'])
    """

    def __init__(
        self,
        explains: Explains,
        module: nn.Module | None = None,
        *,
        interval: int = 100,
        prefix: str = "attr",
        statistics: Sequence[str] = ("share",),
        max_rows: int | None = None,
        n_resamples: int = 200,
        log_pbar: bool = False,
    ) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise InputError(f"interval={interval!r} must be a whole number of steps above 0.")
        self._observer = Observer(explains, module)
        self._shares = LoggedShares(self._observer, prefix, statistics, max_rows, n_resamples)
        self.interval, self.log_pbar = interval, log_pbar
        self._steps = 0

    def __call__(self, batch: TensorDictBase) -> dict[str, Any] | None:
        """The shares in the batch of an optimisation step, or None where it is not its turn.

        Args:
            batch: What the loss was computed on, ``[*B]``.
        """
        due = self._steps % self.interval == 0
        self._steps += 1
        if not due:
            return None
        return {**self._shares.of(batch), "log_pbar": self.log_pbar}

    def state_dict(self) -> dict[str, Any]:
        """How many optimisation steps were seen, so that a resumed training keeps the rhythm."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self._steps = int(state_dict["steps"])

    def register(self, trainer: Trainer, name: str = "attribution") -> None:
        """Puts the hook behind every optimisation step of ``trainer``, under ``name``."""
        trainer.register_module(name, self)
        trainer.register_op("post_optim_log", self)

    def close(self) -> None:
        """Leaves the context, where it was entered here."""
        self._observer.close()
