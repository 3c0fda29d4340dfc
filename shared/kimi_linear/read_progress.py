"""How a long read of a model's files tells how far it is."""

from collections.abc import Callable

ReadProgress = Callable[[int, int], None]
"""Told how many bytes of how many are read: once before the first, then as they come.

The first never decreases and ends at the second, which never changes, unless the read fails. It is
called in the thread that reads, and should return soon.
"""


def unobserved(read_bytes: int, total_bytes: int) -> None:
    """Progress that nobody wants to know of."""
