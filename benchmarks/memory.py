"""Peak memory as ratios to that of the plain gradient.

    python benchmarks/memory.py --only nature vgg

What is counted is what torch allocates during one call, at its highest, beyond what is there already.
"""

from __future__ import annotations

import argparse
import warnings
from contextlib import ExitStack

import torch
from torch.profiler import ProfilerActivity, profile

import floors
import models
import ours
from timing import Contestant

METHODS = ("saliency", "lrp", "epsilon_plus", "alpha2beta1", "gamma", "attn_lrp")
LIMIT = 1.5


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


if __name__ == "__main__":
    main()
