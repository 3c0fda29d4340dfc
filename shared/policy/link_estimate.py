"""How fast a link is, from what was carried over it; it knows neither clock nor store."""

import math
from dataclasses import dataclass, replace
from typing import Final

MEMORY_SECONDS: Final = 60.0
"""A transfer this long ago weighs 1/e of one that ends now."""


@dataclass(frozen=True, slots=True)
class TransferSample:
    """One transfer over a link."""

    transferred_bytes: int
    seconds: float
    """That the link was busy with it."""
    round_trip: float | None = None
    """Seconds, where it was measured."""


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What is known of one link."""

    recent_bytes: float = 0.0
    """Bytes of all transfers, each weighted by its age."""
    recent_seconds: float = 0.0
    """Seconds of all transfers, weighted in the same way."""
    round_trip: float | None = None
    """Seconds; None before it was measured."""
    total_bytes: int = 0
    samples: int = 0
    updated: float = 0.0
    """Time of the latest transfer's end, in seconds."""

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second; None before anything was carried."""
        if self.recent_seconds <= 0 or self.recent_bytes <= 0:
            return None
        return self.recent_bytes / self.recent_seconds

    def observe(self, sample: TransferSample, now: float) -> "LinkEstimate":
        """Take a transfer that ends `now` into account.

        Bytes and seconds are averaged apart, so that a long transfer counts for more than a short
        one, whose time is mostly the round trip.

        Raises:
            ValueError: the sample's numbers are negative or not finite.
        """
        _check(sample)
        decay = math.exp(-max(0.0, now - self.updated) / MEMORY_SECONDS)
        return replace(
            self,
            recent_bytes=self.recent_bytes * decay + sample.transferred_bytes,
            recent_seconds=self.recent_seconds * decay + sample.seconds,
            round_trip=self._average_round_trip(sample.round_trip, decay),
            total_bytes=self.total_bytes + sample.transferred_bytes,
            samples=self.samples + 1,
            updated=max(now, self.updated),
        )

    def _average_round_trip(self, measured: float | None, decay: float) -> float | None:
        if measured is None or self.round_trip is None:
            return self.round_trip if measured is None else measured
        # Measurements in quick succession say little more than one: an eighth of news at least.
        kept = min(decay, 1 - 1 / 8)
        return kept * self.round_trip + (1 - kept) * measured


def _check(sample: TransferSample) -> None:
    numbers = (sample.transferred_bytes, sample.seconds, sample.round_trip or 0.0)
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"{sample} is no transfer")
