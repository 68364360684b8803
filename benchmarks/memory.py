"""Peak memory as ratios to that of the plain gradient.

    python benchmarks/memory.py --only nature vgg

What is counted is what torch allocates during one call, at its highest, beyond what is there already.
Integrated gradients are compared with captum's, where that is installed: its peak as a multiple of
ours, both with the same steps and their own defaults otherwise.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import floors
import models
import ours
from timing import Contestant

METHODS = ("saliency", "lrp", "epsilon_plus", "alpha2beta1", "gamma", "attn_lrp")
LIMIT = 1.5
IG_STEPS, IG_TIMES = 64, 15
#: Batches of which a single step fills what is evaluated at once, so that steps are what differs.
IG_BATCHES = (("mlp", 512), ("mlp", 4096), ("nature", 32))


def peak(contestant: Contestant) -> int:
    """Bytes that one call holds at most, beyond what it was given."""
    contestant.call(contestant.fresh())
    argument = contestant.fresh()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        contestant.call(argument)
    held = most = 0
    for event in sorted(taken.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def integrated(names: Sequence[str]) -> None:
    """Print the peaks of integrated gradients, beside captum's."""
    try:
        from captum import attr
    except ImportError as error:
        print(f"left out: captum ({error})")
        return
    print(f"\nintegrated gradients, {IG_STEPS} steps")
    print(f"{'model':8}{'batch':>6}{'ours MB':>10}{'captum MB':>11}{'times':>8}  (≥ {IG_TIMES})")
    for name, batch in IG_BATCHES:
        if name not in names:
            continue
        net, x = models.build(name, batch, 18)
        ig = attr.IntegratedGradients(net)

        def theirs(x: Tensor, ig: Any = ig) -> Tensor:
            return ig.attribute(x, target=0, n_steps=IG_STEPS)

        with ExitStack() as stack:
            mine = peak(ours.integrated(net, x, IG_STEPS, stack))
        most = peak(Contestant(theirs, x.clone))
        row = f"{name:8}{batch:6}{mine / 2**20:10.2f}{most / 2**20:11.2f}"
        print(f"{row}{most / mine:8.1f}", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = ("mlp", "nature", "vgg", "resnet", "gpt2")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batches = {"mlp": 256, "nature": 32, "vgg": 4, "resnet": 4, "gpt2": 4}
    print(f"{'model':8}{'batch':>6}{'floor MB':>10}" + "".join(f"{m:>14}" for m in METHODS))
    for name in options.only:
        if name in models.NEEDS and not models.available(name):
            print(f"left out: {name} ({models.NEEDS[name]} is not installed)")
            continue
        net, x = models.build(name, batches[name], 18)
        plain = peak(Contestant(floors.gradient(net), x.clone))
        row = f"{name:8}{batches[name]:6}{plain / 2**20:10.2f}"
        for method in METHODS:
            if (method == "attn_lrp") != (name == "gpt2") and method != "saliency":
                row += f"{'–':>14}"
                continue
            with ExitStack() as stack:
                row += f"{peak(ours.contestant(method, net, x, 1, stack)) / plain:14.2f}"
        print(row, flush=True)
    print(f"limit for LRP: {LIMIT:g}")
    integrated(options.only)


if __name__ == "__main__":
    main()
