"""How fast transfers are while there are any, however many there are at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from shared.policy.link_estimate import TransferSample


class TransferMeter:
    """Adds up transfers that overlap."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._under_way = 0
        self._busy_since = 0.0
        self._bytes = 0
        self._seconds = 0.0

    @contextmanager
    def transferring(self, transfer_bytes: int) -> Iterator[None]:
        """Count a transfer, and its bytes if the block does not raise."""
        if not self._under_way:
            self._busy_since = self._clock()
        self._under_way += 1
        try:
            yield
            self._bytes += transfer_bytes
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._seconds += self._clock() - self._busy_since

    def take(self) -> TransferSample:
        """What was transferred since this was asked last; counts anew from now on."""
        if self._under_way:
            now = self._clock()
            self._seconds += now - self._busy_since
            self._busy_since = now
        taken = TransferSample(self._bytes, self._seconds)
        self._bytes, self._seconds = 0, 0.0
        return taken
