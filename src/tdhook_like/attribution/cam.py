"""Where in a convolution's output the evidence lies: Grad-CAM, and guided Grad-CAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_like.attribution.lrp.flow import Flow
from tdhook_like.attribution.lrp.mappers.gradients import RectifierFunctions
from tdhook_like.attribution.lrp.rules.rectifiers import GuidedReLURule
from tdhook_like.attribution.method import Attribution, GradientMethod, Method, PathMethod
from tdhook_like.errors import ContextError, InputError, PathError, listed
from tdhook_like.gradients import gradients
from tdhook_like.hooks.functional import Functions
from tdhook_like.ports import calls_at, port
from tdhook_like.score import Evaluation, Score

if TYPE_CHECKING:
    from tdhook_like.context import HookContext

__all__ = ["GradCAM", "GuidedGradCAM"]

MODES = ("linear", "nearest", "nearest-exact", "cubic", "area")


@dataclass(frozen=True)
class GradCAM(GradientMethod):
    """A layer's channels, weighted by their mean gradient and summed: a map of where the score lies.

    ``L = ReLU(Σ_c α_c A_c)`` with ``α_c`` the mean of ``∂S/∂A_c`` over positions; A the layer's output
    ``[*B, C, *positions]``, with 1 to 3 dimensions of positions. The map ``[*B, *positions]`` is written
    at ``(at_root, path)``. Resized to the positions of each attributed key and the same for all of its
    channels, it is written at ``(root, *in_key)``.

    Source: Selvaraju et al. 2017, eq. 1 and 2.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments (``at=``,
            ``keys=``).
        relu: Whether to keep positive evidence alone.
        interpolate: How the map is resized to keys: ``"linear"`` (over as many dimensions as there
            are), ``"nearest"``, ``"nearest-exact"``, ``"cubic"`` (two dimensions), ``"area"``. None for
            no results at keys.
        channel_dim: Which of the dimensions behind the batch dimensions are the channels.

    Raises:
        ContextError: If no submodule is given, or the method has rules.
        PathError: If results at keys are asked for, and ``at`` chooses several submodules.
        InputError: If a layer gives no positions, or a key has none.

    >>> from tensordict import TensorDict
    >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1, bias=False), torch.nn.Flatten())
    >>> _ = torch.nn.init.constant_(net[0].weight, 2.0)
    >>> method = GradCAM(lambda td: td["y"].sum(-1), at="0")
    >>> with method.prepare(net, ["x"], ["y"]) as hooked:
    ...     td = hooked(TensorDict({"x": torch.tensor([[[1.0, -1.0, 3.0]]])}, [1]))
    >>> td["attr", "x"]
    tensor([[[2., 0., 6.]]])
    """

    relu: bool = field(default=True, kw_only=True)
    interpolate: str | None = field(default="linear", kw_only=True)
    channel_dim: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        _check(self, self.interpolate)

    @property
    def writes_keys(self) -> bool:
        """Whether results go to keys."""
        return self.interpolate is not None

    def prepare(self, *args: Any, **kwargs: Any) -> HookContext:
        """As for every method; one submodule, where its map is to be resized to keys."""
        context = super().prepare(*args, **kwargs)
        if self.interpolate is not None:
            _one_path(self, context)
        return context

    def combine(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The map of a layer's output ``[C, *positions]`` and its gradient, without batch dimensions."""
        return self.map(value, gradient, 0)

    def map(self, value: Tensor, gradient: Tensor, channels: int) -> Tensor:
        """The map, of ``value``'s shape without the channels.

        Args:
            value: The layer's output.
            gradient: The score's gradient there.
            channels: Its dimension of channels; positions are behind.
        """
        weights = gradient.flatten(channels + 1).mean(-1)
        places = value.ndim - channels - 1
        found = (weights.reshape(*weights.shape, *[1] * places) * value).sum(channels)
        return found.relu() if self.relu else found

    def attribute(self, evaluation: Evaluation) -> Attribution:
        """Maps of the chosen layers, and of the keys."""
        captured, dims = evaluation.captured, evaluation.outputs.batch_dims
        paths = [path for path in evaluation.at if path in captured.outputs]
        values = [value for path in paths for value in captured.outputs[path]]
        found = gradients(evaluation.parts, values, create_graph=self.create_graph)
        attribution, n = Attribution([]), 0
        maps: list[list[Tensor]] = []
        for path in paths:
            calls: list[Sequence[Tensor] | Tensor] = []
            for i, value in enumerate(captured.outputs[path]):
                inner = captured.added(path, i)
                columns = []
                for grads in found:
                    pair = [captured.batch_first(t, path, i, dims) for t in (value, grads[n])]
                    a, g = (_channels_at(t, dims + inner, self.channel_dim, path) for t in pair)
                    columns.append(self.map(a, g, dims + inner))
                maps.append(columns)
                calls.append([captured.put_back(column, path, i, dims) for column in columns])
                n += 1
            attribution.modules[path] = calls
        if self.interpolate is not None:
            if len(maps) != 1:
                raise PathError(
                    f"{listed(paths)} gives {len(maps)} tensors in one run, so it is not known which map "
                    "is meant for the keys: interpolate=None writes all of them at their paths."
                )
            inner = captured.added(paths[0], 0)
            attribution.inputs = [
                [resized(m, m.ndim - dims - inner, x, self.interpolate) for m in maps[0]]
                for x in evaluation.leaves
            ]
        return attribution


@dataclass(frozen=True)
class GuidedGradCAM(PathMethod):
    """Guided backpropagation times the layer's Grad-CAM map: which details, and where.

    The map follows plain gradients, and is resized to the positions of each attributed key.

    Source: Selvaraju et al. 2017, section 3.2.

    Args:
        target: What is explained; see :class:`Method`, also for the keyword arguments (``at=``,
            ``keys=``).
        interpolate: As of :class:`GradCAM`.
        channel_dim: As of :class:`GradCAM`.

    Raises:
        ContextError: If no submodule is given, or the method has rules.
        PathError: If ``at`` chooses several.
        InputError: If the layer gives no positions, or a key has none.

    >>> GuidedGradCAM("y", at="features.3").interpolate
    'linear'
    """

    interpolate: str = field(default="linear", kw_only=True)
    channel_dim: int = field(default=0, kw_only=True)

    own_at: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        _check(self, self.interpolate)

    def prepare(self, *args: Any, **kwargs: Any) -> HookContext:
        """As for every method; one submodule."""
        context = super().prepare(*args, **kwargs)
        _one_path(self, context)
        return context

    def attribute(self, score: Score, baselines: tuple[Tensor, ...]) -> Attribution:
        """The map under plain gradients, and the inputs' gradient under guided ones."""
        (path,) = score.at_paths
        cam = GradCAM(self.target, at=(path,), channel_dim=self.channel_dim)
        here: dict[NestedKey, Tensor] = {
            key: x.unsqueeze(0) for key, x in zip(score.keys, score.inputs, strict=True)
        }
        assert score.layout  # tried out before anything is installed
        with torch.no_grad(), score.installed():
            shapes = [value.shape for value in calls_at(score.evaluated(here)[1], path)]
        if len(shapes) != 1:
            raise PathError(
                f"{path!r} gives {len(shapes)} tensors in one run, so it is not known which map is meant."
            )
        added = next(iter(here.values())).new_zeros(shapes[0]).requires_grad_()
        with score.installed():
            parts, outputs = score.evaluated({**here, port(path, 0, "add"): added})
            plain = gradients(parts, [added])
        value, dims = calls_at(outputs, path)[0].detach(), len(score.batch)
        a = _channels_at(value[0], dims, self.channel_dim, path)
        maps = [
            cam.map(a, _channels_at(g[0], dims, self.channel_dim, path), dims) for (g,) in plain
        ]
        guided = self._guided(score)
        inputs = []
        for i, x in enumerate(score.inputs):
            sizes = [resized(m, m.ndim - dims, x, self.interpolate) for m in maps]
            inputs.append([g[i] * size for g, size in zip(guided, sizes, strict=True)])
        return Attribution(inputs, {path: [maps]})

    def _guided(self, score: Score) -> list[list[Tensor]]:
        mode = Functions(RectifierFunctions(GuidedReLURule()).around(Flow()))
        points: dict[NestedKey, Tensor] = {
            key: x.unsqueeze(0).requires_grad_()
            for key, x in zip(score.keys, score.inputs, strict=True)
        }
        with score.installed(mode):
            mode.running += 1
            try:
                parts, _ = score.evaluated(points)
            finally:
                mode.running -= 1
            found = gradients(parts, list(points.values()))
        return [[g[0] for g in grads] for grads in found]


def resized(found: Tensor, places: int, x: Tensor, mode: str) -> Tensor:
    """A map ``[*lead, *positions]`` at the positions of a key's value, alike for all its channels.

    Args:
        found: The map.
        places: How many of its dimensions are positions.
        x: The key's value ``[*lead, *channels, *positions]``.
        mode: How it is resized.

    Raises:
        InputError: If the key has no such positions.

    >>> resized(torch.tensor([[1.0, 2.0]]), 1, torch.zeros(1, 3, 4), "nearest")[0]
    tensor([[1., 1., 2., 2.],
            [1., 1., 2., 2.],
            [1., 1., 2., 2.]])
    """
    lead = found.shape[: found.ndim - places]
    if x.ndim < found.ndim or x.shape[: len(lead)] != lead:
        raise InputError(
            f"A map of shape {tuple(found.shape)} with {places} dimensions of positions cannot be "
            f"resized to an input of shape {tuple(x.shape)}: name the keys that have positions, "
            "keys=[…], or take interpolate=None."
        )
    size = x.shape[x.ndim - places :]
    kind = {("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    options: dict[str, Any] = {"mode": kind.get((mode, places), mode)}
    if mode in ("linear", "cubic"):
        options["align_corners"] = False
    flat = found.reshape(-1, 1, *found.shape[len(lead) :])
    wide = F.interpolate(flat, size=tuple(size), **options)
    between = [1] * (x.ndim - found.ndim)
    return wide.reshape(*lead, *between, *size).expand(x.shape).clone()


def _channels_at(t: Tensor, lead: int, channel_dim: int, path: str) -> Tensor:
    """A layer's output with its channels right behind the leading dimensions."""
    features = t.ndim - lead
    if not 2 <= features <= 4 or not -features <= channel_dim < features:
        raise InputError(
            f"What {path!r} gives has {features} dimensions behind the batch dimensions: channels "
            f"(channel_dim={channel_dim}) and 1 to 3 of positions are needed."
        )
    return t.movedim(lead + channel_dim % features, lead)


def _check(method: Method, mode: str | None) -> None:
    if not method.at:
        raise ContextError(f"{type(method).__name__} needs a layer: at='path.of.the.convolution'.")
    if method.rules is not None:
        raise ContextError(f"{type(method).__name__} follows gradients; leave rules= out.")
    if mode is not None and mode not in MODES:
        raise InputError(f"interpolate must be one of {', '.join(MODES)}, or None; got {mode!r}.")


def _one_path(method: Method, context: HookContext) -> None:
    paths = [] if context.at is None else list(context.at.modules)
    if len(paths) != 1:
        raise PathError(
            f"{type(method).__name__}: at={method.at!r} chooses {len(paths)} submodules, "
            f"{listed(paths)}; results at keys come from one."
        )
