"""The command line: ``python -m tdhook_like demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tdhook_like import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs what it asks for; gives the exit status.

    >>> main(["--version"])
    Traceback (most recent call last):
      ...
    SystemExit: 0
    """
    parser = argparse.ArgumentParser(prog="tdhook_like", description="Attribution per key.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="explain a trained policy and check it against the cause"
    )
    demo.add_argument("--out", default="demo_out", help="where results go (default: demo_out)")
    demo.add_argument("--episodes", type=int, default=4, help="episodes to explain (default: 4)")
    demo.add_argument("--seed", type=int, default=0, help="settles the episodes (default: 0)")
    given = parser.parse_args(arguments)
    if given.episodes < 1:
        parser.error("--episodes must be at least 1")
    try:
        from tdhook_like.demo.run import main as run
    except ImportError as error:
        print(
            f"The demo needs the extras: pip install 'tdhook_like[rl,viz]' ({error}).",
            file=sys.stderr,
        )
        return 2
    return run(given.out, given.episodes, given.seed)


if __name__ == "__main__":
    sys.exit(main())
