"""Logs how far something long is: now and then, and when it is done."""

import time
from collections.abc import Callable
from typing import Final

import structlog

LOG_SECONDS: Final = 5.0
"""Between two lines, at least."""

log = structlog.get_logger()


class ProgressLog:
    """Logs `event` with percent, bytes and seconds; the first call begins the time.

    Args:
        event: what is under way.
        clock: gives seconds.
    """

    def __init__(self, event: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._event = event
        self._clock = clock
        self._began: float | None = None
        self._logged = 0.0

    def __call__(self, read_bytes: int, total_bytes: int) -> None:
        """Tell that `read_bytes` of `total_bytes` are done."""
        now = self._clock()
        if self._began is None:
            self._began = self._logged = now
        done = read_bytes >= total_bytes
        if not done and now - self._logged < LOG_SECONDS:
            return
        self._logged = now
        log.info(
            self._event,
            percent=100 if done else 100 * read_bytes // total_bytes,
            read_bytes=read_bytes,
            total_bytes=total_bytes,
            seconds=round(now - self._began, 1),
        )
