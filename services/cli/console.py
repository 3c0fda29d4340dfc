"""Lines for the person at the terminal. That nobody reads them any more is no reason to stop."""

import sys
from contextlib import suppress


def say(line: str) -> None:
    """Write a line to standard output."""
    with suppress(OSError):
        print(line, flush=True)


def warn(line: str) -> None:
    """Write a line to standard error."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
