"""How large the segments are that a state is cut into."""

from typing import Final

SEGMENT_BYTES: Final = 4 * 2**20
"""Before encoding. Values of this size are pulled fastest, and segments are coded and moved side by
side."""

_SEGMENT_TOKENS: Final = 512


def cut_latents(start: int, stop: int) -> list[tuple[int, int]]:
    """Cut the tokens [start, stop), which are all computed, into those of one segment each."""
    starts = range(start, stop, _SEGMENT_TOKENS)
    return [(first, min(first + _SEGMENT_TOKENS, stop)) for first in starts]
