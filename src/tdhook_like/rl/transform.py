"""Attributions in what a replay buffer samples."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import nn
from torchrl.data import Composite
from torchrl.envs import Transform

from tdhook_like.errors import ContextError
from tdhook_like.rl.observer import Explains, Observer

__all__ = ["AttributionTransform"]


class AttributionTransform(Transform):
    """Writes attributions into every batch that a replay buffer gives out.

    What is stored is not touched: a sample is explained under the weights that the model has when
    it is drawn. The model is observed (``hooked.observe``): an action that was recorded is the one
    that is explained, and nothing of the model, its buffers or the random numbers changes, so
    training on the samples is what it would be without. Works with memory-mapped storages, in
    prefetching threads and under ``no_grad``.

    The model is no submodule of the transform: buffers switch their transforms to evaluation mode
    and move them between devices, which is none of the model's business.

    Args:
        explains: A method, and the module beside it; or a hooked module, or the context of one.
        module: What is explained, where ``explains`` is a method. Its context is entered here and
            left by :meth:`close`.

    Raises:
        ContextError: If a module is missing or given twice; if the transform is put into an
            environment, where a hooked policy explains itself as it acts.
        TdhookLikeError: As :meth:`Method.prepare` does.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
    >>> from torchrl.modules import ValueOperator
    >>> from tdhook_like import InputXGradient
    >>> critic = ValueOperator(nn.Linear(3, 1), in_keys=["observation"])
    >>> buffer = ReplayBuffer(storage=LazyTensorStorage(100), batch_size=8)
    >>> _ = buffer.extend(TensorDict({"observation": torch.randn(32, 3)}, [32]))
    >>> _ = buffer.append_transform(AttributionTransform(InputXGradient(), critic))
    >>> buffer.sample()["attr", "observation"].shape
    torch.Size([8, 3])
    """

    _observer: Observer

    def __init__(self, explains: Explains, module: nn.Module | None = None) -> None:
        observer = Observer(explains, module)
        super().__init__(in_keys=observer.context.in_keys, out_keys=observer.context.written())
        self.__dict__["_observer"] = observer  # past nn.Module, which would register the model

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explains a sample ``[*B]``, written into it.

        Args:
            tensordict: The sample.

        Returns:
            The same TensorDict.
        """
        return self._observer.observe(tensordict)

    def transform_output_spec(self, output_spec: Composite) -> Composite:
        """Refuses an environment; only there is a transform asked for specs."""
        raise ContextError(
            "AttributionTransform belongs into a replay buffer. In an environment let the hooked "
            "policy act, env.rollout(n, policy=hooked): it explains itself at every step."
        )

    def close(self) -> None:
        """Leaves the context, where it was entered here."""
        self._observer.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._observer.context.method).__name__})"
