"""A progress bar over evaluations, for those who ask for one; tqdm is imported only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tdhook_like.errors import TdhookLikeError

__all__ = ["MissingTqdmError", "counting"]


class MissingTqdmError(TdhookLikeError, ImportError):
    """A progress bar was asked for, but tqdm is not installed."""


@contextmanager
def counting(shown: bool, what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Gives a function that is told how many more evaluations are done.

    Args:
        shown: Whether there is a bar at all.
        what: The word in front of it.
        total: How many evaluations there will be.

    Raises:
        MissingTqdmError: If a bar is asked for and tqdm cannot be imported.

    >>> with counting(False, "FeatureAblation", 10) as advance:
    ...     advance(10)
    """
    if not shown:
        yield lambda n: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingTqdmError(
            "progress=True draws its bar with tqdm, which cannot be imported: pip install tqdm, or "
            "leave progress out."
        ) from error
    with tqdm(total=total, desc=what, unit="evaluation") as bar:
        yield bar.update
