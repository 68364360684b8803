"""Interleaved timing: every contestant runs in every round, and only ratios within a round count.

A machine that slows down for a second slows every contestant of that round alike, so a ratio
survives what an absolute time does not. With one thread it is the process's own time that is
read, which does not run while others have the core.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TURN_SECONDS = 2e-3
MOST_REPEATS = 64
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Contestant:
    """A call to time, and what makes a fresh argument for it outside the timed region."""

    call: Callable[[Any], object]
    fresh: Callable[[], Any]


def _turn(contestant: Contestant, repeats: int) -> float:
    """Seconds per call, the garbage collector off."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    arguments = [contestant.fresh() for _ in range(repeats)]
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for argument in arguments:
            contestant.call(argument)
        return (clock() - start) / repeats
    finally:
        gc.enable()


def interleave(
    contestants: Mapping[str, Contestant], rounds: int, budget: float
) -> dict[str, list[float]]:
    """Time all contestants round by round.

    Args:
        contestants: by name; the first one sets how often a call is repeated per turn.
        rounds: how many rounds at most.
        budget: seconds after which no further round starts, once a few have run.

    Returns:
        The seconds per call of every contestant, one number per round.
    """
    names = list(contestants)
    for name in names:
        _turn(contestants[name], 1)
    # What warm-up left behind is here to stay: scanning it again every turn would take longer
    # than the turn itself.
    gc.freeze()
    first = min(_turn(contestants[names[0]], 1) for _ in range(3))
    repeats = max(1, min(MOST_REPEATS, round(TURN_SECONDS / first)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    stop = time.perf_counter() + budget
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() > stop:
            break
        # Rotated, so that nobody always runs in the shadow of the same neighbour.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_turn(contestants[name], repeats))
    gc.unfreeze()
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How long a contestant took relative to another, round by round.

    Attributes:
        median: over the rounds.
        spread: half the distance between the quartiles.
    """

    median: float
    spread: float


def ratio(seconds: Mapping[str, list[float]], name: str, floor: str) -> Ratio:
    """Compare two contestants of the same rounds."""
    pairs = zip(seconds[name], seconds[floor], strict=True)
    lower, median, upper = statistics.quantiles([mine / theirs for mine, theirs in pairs], n=4)
    return Ratio(median, (upper - lower) / 2)
