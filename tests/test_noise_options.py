"""NoiseTunnel's options: taken from the inner method, printed, refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from explaining import explained
from method_references import Formula
from tdhook_like import (
    LRP,
    ContextError,
    InputError,
    IntegratedGradients,
    KeyNotFoundError,
    Saliency,
    TargetError,
)
from tdhook_like.attribution.ablation import FeatureAblation
from tdhook_like.attribution.cam import GradCAM
from tdhook_like.attribution.combined import AttributionMean
from tdhook_like.attribution.layers import Conductance
from tdhook_like.attribution.lrp import EpsilonPlus
from tdhook_like.attribution.noise import NoiseTunnel


def test_what_the_inner_method_was_told_holds_for_the_tunnel():
    inner = LRP(EpsilonPlus(), ("y", 0), root="relevance", keys=["a"], unreached="ignore")
    method = NoiseTunnel(inner)
    assert (method.target, method.root, method.keys) == (("y", 0), "relevance", ("a",))
    assert method.rules is inner.rules and method.unreached == "ignore"
    other = NoiseTunnel(inner, target=("y", 1), root="noisy")
    assert (other.target, other.root, other.keys) == (("y", 1), "noisy", ("a",))
    again = other.replaced(n_samples=3)
    assert isinstance(again, NoiseTunnel)
    assert (again.n_samples, again.root, again.method) == (3, "noisy", inner)


def test_the_size_of_chunks_is_the_inner_methods_unless_it_is_given():
    inner = IntegratedGradients("y", internal_batch_size=7)
    assert NoiseTunnel(inner).internal_batch_size == 7
    assert NoiseTunnel(inner, internal_batch_size=9).internal_batch_size == 9


def test_what_is_written_is_printed():
    context = NoiseTunnel(Saliency("y")).prepare(nn.Linear(2, 1), ["x"], ["y"])
    assert "('attr', 'x'), ('attr_error', 'x')" in str(context)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no samples": (lambda: NoiseTunnel(Saliency("y"), n_samples=0), InputError, "n_samples"),
    "half a sample": (lambda: NoiseTunnel(Saliency("y"), n_samples=2.5), InputError, "n_samples"),
    "variance of one": (
        lambda: NoiseTunnel(Saliency("y"), n_samples=1, kind="vargrad"),
        InputError,
        "at least 2",
    ),
    "negative noise": (lambda: NoiseTunnel(Saliency("y"), stdevs=-0.1), InputError, "stdevs"),
    "negative noise of a key": (
        lambda: NoiseTunnel(Saliency("y"), stdevs={"x": -0.1}),
        InputError,
        "stdevs\\['x'\\]",
    ),
    "infinite noise": (
        lambda: NoiseTunnel(Saliency("y"), stdevs=float("inf")),
        InputError,
        "finite",
    ),
    "noise that is a word": (lambda: NoiseTunnel(Saliency("y"), stdevs="a"), InputError, "stdevs"),
    "unknown kind": (lambda: NoiseTunnel(Saliency("y"), kind="mean"), InputError, "smoothgrad_sq"),
    "negative seed": (lambda: NoiseTunnel(Saliency("y"), seed=-1), InputError, "seed"),
    "no method": (lambda: NoiseTunnel("y"), ContextError, "takes a method"),  # pyright: ignore
    "a sum": (
        lambda: NoiseTunnel(AttributionMean(Saliency("y"), Saliency("y"))),
        ContextError,
        "Wrap each of them",
    ),
    "submodules along a path of its own": (
        lambda: NoiseTunnel(Conductance("y", at="0")),
        ContextError,
        "leave at= out",
    ),
    "a map of one run": (lambda: NoiseTunnel(GradCAM("y", at="0")), ContextError, "one run"),
    "a graph": (lambda: NoiseTunnel(Saliency("y", create_graph=True)), ContextError, "graph"),
    "unknown option": (lambda: NoiseTunnel(Saliency("y"), n=3), TypeError, "'n'"),
    "unknown key": (
        lambda: NoiseTunnel(Saliency("y"), stdevs={"z": 0.1}).prepare(
            nn.Linear(2, 1), ["x"], ["y"]
        ),
        KeyNotFoundError,
        "'z'",
    ),
    "unknown key of a mask": (
        lambda: NoiseTunnel(FeatureAblation("y", masks={"z": torch.tensor([0])})).prepare(
            nn.Linear(2, 1), ["x"], ["y"]
        ),
        KeyNotFoundError,
        "'z'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case):
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()


def test_noise_of_another_shape_is_refused():
    method = NoiseTunnel(Saliency("y"), stdevs=torch.ones(5))
    with pytest.raises(InputError, match=r"stdevs of 'x' has shape \(5,\)"):
        explained(method, nn.Linear(3, 1), (4,), x=torch.randn(4, 3))


def test_a_score_that_is_not_finite_nearby_is_reported():
    method = NoiseTunnel(Saliency("y"), stdevs=5.0)
    with pytest.raises(TargetError, match="NaN or Inf at a point that NoiseTunnel"):
        explained(method, Formula(torch.log), (4,), x=torch.ones(4, 1))
