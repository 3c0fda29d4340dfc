"""Log lines of how long something took: with them the parts of a request can be laid side by side.

They are written at the level `debug`. The line comes when the part ends, with its seconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import structlog

log = structlog.get_logger()


@contextmanager
def timed(event: str, **fields: object) -> Iterator[None]:
    """Log an event, and its seconds, when the block has ended without an error."""
    started = monotonic()
    yield
    log.debug(event, seconds=round(monotonic() - started, 6), **fields)
