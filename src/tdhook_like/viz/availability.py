"""The check that matplotlib is there, made before anything else of this room is imported."""

from __future__ import annotations

from tdhook_like.errors import TdhookLikeError

__all__ = ["MissingMatplotlibError"]


class MissingMatplotlibError(TdhookLikeError, ImportError):
    """Pictures were asked for, but matplotlib is not installed."""


try:
    import matplotlib as matplotlib
except ImportError as error:
    raise MissingMatplotlibError(
        "tdhook_like.viz draws with matplotlib, which cannot be imported: "
        "pip install tdhook_like[viz]"
    ) from error
