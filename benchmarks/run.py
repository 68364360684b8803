"""Speed as ratios to the floor, ours beside the peers that are installed.

    python benchmarks/run.py --only mlp nature --methods lrp epsilon_plus --rounds 30

A ratio is the median over rounds of (time of the method / time of the floor in that round), ± half
the distance between its quartiles; all contestants take turns within one process. Floors: one
forward and one backward to the inputs; for integrated gradients one forward of all steps stacked
and one backward per target; for EpsilonPlus an extra forward; for DeepLift one of a single baseline; for
ablation, sampled Shapley values and occlusion the forwards alone, stacked, on inputs that are there;
for 500 modules, registering and removing one hook on each; for the plain call of a wrapped policy,
that of one never wrapped.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

import floors
import models
import ours
import peers
from cases import CASES, METHODS, Case
from timing import Contestant, Ratio, interleave, ratio


def floor(case: Case, net: nn.Module, x: Tensor) -> Contestant:
    """Give the least work that the case's method has to do."""
    if case.method == "plain":
        return ours.plain_floor(net, x)
    if case.method.startswith("ig"):
        return Contestant(floors.integrated(net, case.targets), x.clone)
    if case.method in floors.EVALUATIONS:
        count = floors.EVALUATIONS[case.method](x)
        return Contestant(floors.evaluated(net), floors.stacks(x, count))
    special = {
        "epsilon_plus": floors.with_extra_forward,
        "deeplift": floors.compared,
        "enter": floors.hooking,
        "call": floors.hooked_gradient,
    }
    return Contestant(special.get(case.method, floors.gradient)(net), x.clone)


def measure(
    case: Case, present: dict[str, peers.Maker], rounds: int, budget: float
) -> tuple[float, dict[str, Ratio]]:
    """Give the floor's best time in seconds, and every contestant's ratio to it."""
    net, x = models.build(case.model, case.batch, case.outputs)
    method = "ig" if case.method == "ig_each" else case.method
    with ExitStack() as stack:
        contestants = {
            "floor": floor(case, net, x),
            "ours": ours.contestant(case.method, net, x, case.targets, stack),
        }
        for name, make in present.items():
            contestant = make(method, net, x, case.targets, stack)
            if contestant is not None:
                contestants[name] = contestant
        seconds = interleave(contestants, rounds, budget)
    ratios = {name: ratio(seconds, name, "floor") for name in contestants}
    return min(seconds["floor"]), ratios


def verdict(case: Case, ratios: dict[str, Ratio]) -> str:
    """Say which targets were reached."""
    said = []
    if case.limit < float("inf"):
        said.append("reached" if ratios["ours"].median <= case.limit else "NOT reached")
    peer, times = case.faster or ("", 0.0)
    if peer in ratios:
        speedup = ratios[peer].median / ratios["ours"].median
        reached = "reached" if speedup >= times else "NOT reached"
        said.append(f"{speedup:.1f} × as fast as {peer} (≥ {times:g}: {reached})")
    return "; ".join(said)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=models.MODELS, default=models.MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=40, help="at most, per case")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds per case, about")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is the steadiest")
    parser.add_argument(
        "--quick", action="store_true", help="a first look: 7 rounds, 1 second each"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    options = parser.parse_args(given)
    if options.quick:
        options.rounds, options.budget = 7, 1.0
    return options


def main() -> None:
    """Run the selected cases and print the table."""
    options = arguments()
    torch.set_num_threads(options.threads)
    # The peers warn at every call; ours must not, and the test suite sees to that.
    warnings.simplefilter("ignore")
    present, missing = ({}, {}) if options.no_peers else peers.find()
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})")
    header = f"{'method':24}{'model':8}{'batch':>6}{'floor ms':>10}{'ours':>13}{'limit':>7}"
    print(header + "".join(f"{name:>8}" for name in present) + "  target", flush=True)
    for case in CASES:
        if case.model not in options.only or case.method not in options.methods:
            continue
        if case.model in models.NEEDS and not models.available(case.model):
            print(f"left out: {case} on {case.model} ({models.NEEDS[case.model]} is not installed)")
            continue
        seconds, ratios = measure(case, present, options.rounds, options.budget)
        row = f"{case!s:24}{case.model:8}{case.batch:6}{seconds * 1e3:10.2f}"
        row += f"{ratios['ours'].median:7.2f} ±{ratios['ours'].spread:4.2f}{case.limit:7.2f}"
        row += "".join(
            f"{ratios[name].median:8.2f}" if name in ratios else f"{'–':>8}" for name in present
        )
        print(f"{row}  {verdict(case, ratios)}", flush=True)


if __name__ == "__main__":
    main()
