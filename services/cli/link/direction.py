"""One direction of a link at work: takes bytes from sockets and gives them to others in time."""

import asyncio
import math
from typing import Protocol

from services.cli.link.clock import LinkClock
from services.cli.link.schedule import Flow, LinkSchedule, LinkSettings


class Source(Protocol):
    """Where a passage's bytes come from."""

    def hold_back(self) -> None:
        """Read no more for now."""

    def go_on(self) -> None:
        """Read on."""


class Destination(Protocol):
    """Where a passage's bytes go to."""

    @property
    def takes_bytes(self) -> bool:
        """Whether it is connected and has room."""

    def give(self, piece: memoryview) -> None:
        """Take bytes, or with an empty piece the end of them."""


class Direction:
    """What all connections share in one direction: its bandwidth and its counter.

    Args:
        clock: of the link; while it is stopped nothing moves.
        settings: of the link.
        seed: makes jitter and corruption repeatable.
    """

    def __init__(self, clock: LinkClock, settings: LinkSettings, seed: str) -> None:
        self.carried_bytes = 0
        self.clock = clock
        self.schedule = LinkSchedule(settings, seed)
        self._passages: dict[Flow, Passage] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes that have entered and not arrived."""
        return sum(flow.waiting_bytes + flow.travelling_bytes for flow in self._passages)

    @property
    def settings(self) -> LinkSettings:
        """Of the bytes that are not on their way yet."""
        return self.schedule.settings

    @settings.setter
    def settings(self, settings: LinkSettings) -> None:
        self.schedule.settings = settings
        self.go_on()

    def add(self, passage: "Passage") -> None:
        """Count a passage in."""
        self._passages[passage.flow] = passage

    def remove(self, passage: "Passage") -> None:
        """Forget a passage and what it holds."""
        passage.flow.discard()
        del self._passages[passage.flow]

    def go_on(self) -> None:
        """Look at everything anew, after a stall or with other settings."""
        for flow, passage in self._passages.items():
            self.schedule.admit(flow, self.clock.now())
            passage.await_arrival()
        self.send()

    def send(self) -> None:
        """Put on the link what leaves soon, now and whenever there is more to send."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.clock.is_stopped:
            return
        now = self.clock.now()
        for flow in self.schedule.send(now):
            if flow in self._passages:
                self._passages[flow].on_sent()
        next_turn = self.schedule.next_turn
        if next_turn is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_in_milliseconds(next_turn - now), self.send)

    def close(self) -> None:
        """Wake no more."""
        if self._timer is not None:
            self._timer.cancel()


class Passage:
    """One connection's way through a direction, from the socket that is read to the one written."""

    def __init__(self, direction: Direction, source: Source, destination: Destination) -> None:
        self.flow = Flow()
        self.has_ended = False
        """Whether the end has arrived."""
        self._direction = direction
        self._source = source
        self._destination = destination
        self._timer: asyncio.TimerHandle | None = None
        direction.add(self)

    def open(self) -> None:
        """Let bytes leave the entrance."""
        self.flow.is_open = True
        self._direction.schedule.admit(self.flow, self._direction.clock.now())
        self._direction.send()

    def enter(self, chunk: bytes) -> None:
        """Take a chunk that was read, or with an empty one the end."""
        self._direction.schedule.enter(self.flow, chunk, self._direction.clock.now())
        self._direction.send()
        if self.flow.waiting_bytes >= self._direction.settings.entrance_bytes:
            self._source.hold_back()

    def on_sent(self) -> None:
        """Something left the entrance."""
        if self.flow.waiting_bytes < self._direction.settings.entrance_bytes:
            self._source.go_on()
        self.await_arrival()

    def await_arrival(self) -> None:
        """Wake when the next piece arrives, unless the destination would not take it."""
        arrival = self.flow.next_arrival
        clock = self._direction.clock
        may_arrive = not clock.is_stopped and self._destination.takes_bytes
        if self._timer is None and arrival is not None and may_arrive:
            seconds = _in_milliseconds(arrival - clock.now())
            self._timer = asyncio.get_running_loop().call_later(seconds, self._arrive)

    def close(self) -> None:
        """Drop what is on its way."""
        if self._timer is not None:
            self._timer.cancel()
        self._direction.remove(self)

    def _arrive(self) -> None:
        self._timer = None
        direction = self._direction
        if direction.clock.is_stopped:
            return
        now = direction.clock.now()
        while self._destination.takes_bytes:
            piece = self.flow.take_arrived(now)
            if piece is None:
                break
            direction.carried_bytes += len(piece)
            self.has_ended = not piece
            self._destination.give(piece)
        direction.schedule.admit(self.flow, now)
        direction.send()
        self.await_arrival()


def _in_milliseconds(seconds: float) -> float:
    """Round up to what timers count: one that is early would be set again, and spin."""
    return max(math.ceil(seconds * 1000), 0) / 1000
