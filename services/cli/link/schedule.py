"""When bytes cross one direction of a link of limited bandwidth, computed in the times it is given.

It knows no sockets and no clock, so that the same bytes at the same times cross alike.
"""

import math
from collections import deque
from random import Random
from typing import Final

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from shared.quantities import Bandwidth, Delay, Probability

AHEAD: Final = 0.005
"""Seconds for which bytes are put on the link beforehand, so that it never idles for a timer."""

_LATENESS: Final = 0.02
"""Seconds that an arrival may be noticed late without the link running dry."""
_PIECE_SECONDS: Final = 0.002
_SMALLEST_PIECE: Final = 1448
_LARGEST_PIECE: Final = 2**16
_UNLIMITED_PIECE: Final = 2**18
_NOTEWORTHY_BANDWIDTH: Final = 8e9
"""Bits a second for which an unlimited link has room."""
_MOST_TRAVELLING: Final = 2**28
_NEVER: Final = 2**62


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class LinkSettings:
    """What a link does to the bytes that cross it; both directions do the same."""

    bandwidth: Bandwidth = 0.0
    """Bits a second in each direction, shared by all connections; 0 sets no limit."""
    round_trip: Delay = 0.0
    """Seconds to the other end and back."""
    jitter: Delay = 0.0
    """Seconds by which bytes are late at most, drawn uniformly."""
    corruption: Probability = 0.0
    """Probability that a byte is changed on its way."""

    def seconds_for(self, size: int) -> float:
        """Seconds for which so many bytes occupy the link."""
        return size * 8 / self.bandwidth if self.bandwidth else 0.0

    @property
    def piece_bytes(self) -> int:
        """Bytes that one connection may send before it is another's turn: 2 ms of the link."""
        if not self.bandwidth:
            return _UNLIMITED_PIECE
        return min(max(self._bytes_in(_PIECE_SECONDS), _SMALLEST_PIECE), _LARGEST_PIECE)

    @property
    def entrance_bytes(self) -> int:
        """Bytes of one connection that wait for the link before its sender is held back."""
        return max(self._bytes_in(2 * AHEAD), self.piece_bytes)

    @property
    def travelling_bytes(self) -> int:
        """Bytes of one connection that are on their way before it has to wait: what the link holds.

        A receiver that does not read keeps them there, as it keeps a sender's window closed.
        """
        seconds = self.round_trip / 2 + self.jitter + AHEAD + _LATENESS
        return min(self._bytes_in(seconds) + self.piece_bytes, _MOST_TRAVELLING)

    def _bytes_in(self, seconds: float) -> int:
        return int((self.bandwidth or _NOTEWORTHY_BANDWIDTH) * seconds / 8)


class Flow:
    """Bytes of one connection in one direction: at the link's entrance, then on their way.

    An empty piece is the end of the flow. Until it is open, nothing of it leaves the entrance.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.has_turn = False
        self.ready_at = 0.0
        """When it last got its turns; before that it used none of the link."""
        self.waiting_bytes = 0
        self.travelling_bytes = 0
        self._waiting: deque[tuple[float, memoryview]] = deque()
        self._travelling: deque[tuple[float, memoryview]] = deque()
        self._latest_arrival = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether a piece is at the entrance."""
        return bool(self._waiting)

    @property
    def next_arrival(self) -> float | None:
        """When the next piece is at the other end."""
        return self._travelling[0][0] if self._travelling else None

    def wait(self, piece: memoryview, entered: float) -> None:
        """Put a piece at the entrance."""
        self._waiting.append((entered, piece))
        self.waiting_bytes += len(piece)

    def take_waiting(self, most: int) -> tuple[float, memoryview]:
        """Take at most so many bytes from the entrance, and when they came there."""
        entered, piece = self._waiting.popleft()
        if len(piece) > most:
            self._waiting.appendleft((entered, piece[most:]))
            piece = piece[:most]
        self.waiting_bytes -= len(piece)
        return entered, piece

    def travel(self, piece: memoryview, arrival: float) -> None:
        """Put a piece on its way; it arrives no earlier than the one before it."""
        self._latest_arrival = max(self._latest_arrival, arrival)
        self._travelling.append((self._latest_arrival, piece))
        self.travelling_bytes += len(piece)

    def take_arrived(self, now: float) -> memoryview | None:
        """Take the next piece off the link, if it is at the other end by now."""
        if not self._travelling or self._travelling[0][0] > now:
            return None
        _, piece = self._travelling.popleft()
        self.travelling_bytes -= len(piece)
        return piece

    def discard(self) -> None:
        """Forget all bytes."""
        self._waiting.clear()
        self._travelling.clear()
        self.waiting_bytes = self.travelling_bytes = 0


class LinkSchedule:
    """One direction of a link: bytes leave one after the other and arrive half a round trip later.

    A piece of n bytes occupies the link for n * 8 / bandwidth seconds. Flows take turns of at most
    `piece_bytes`, so that none waits for another's backlog.

    Args:
        settings: what happens to bytes that are not on their way yet; they may be replaced.
        seed: makes jitter and corruption repeatable.
    """

    def __init__(self, settings: LinkSettings, seed: str) -> None:
        self._random = Random(seed)  # noqa: S311 - it has to be repeatable
        self._turns: deque[Flow] = deque()
        self._free_at = 0.0
        self._large_chunk: int | None = None
        self.settings = settings

    @property
    def settings(self) -> LinkSettings:
        """What happens to bytes that are not on their way yet."""
        return self._settings

    @settings.setter
    def settings(self, settings: LinkSettings) -> None:
        self._settings = settings
        self._sound_bytes = self._draw_sound_bytes()

    @property
    def next_turn(self) -> float | None:
        """When `send` has something to do again; None if no flow waits for the link."""
        return self._free_at - AHEAD / 2 if self._turns else None

    def damage_next(self, larger_than: int) -> None:
        """Change a byte of the next chunk that enters with more bytes than that."""
        self._large_chunk = larger_than

    def enter(self, flow: Flow, chunk: bytes, now: float) -> None:
        """Put a chunk at the entrance; an empty one ends the flow."""
        if self._large_chunk is not None and len(chunk) > self._large_chunk:
            self._large_chunk = None
            chunk = _with_a_byte_changed(chunk)
        flow.wait(memoryview(chunk), now)
        self.admit(flow, now)

    def admit(self, flow: Flow, now: float) -> None:
        """Give a flow its turns, if it has something to send and its bytes have room."""
        if flow.has_turn or not self._may_send(flow):
            return
        flow.has_turn = True
        flow.ready_at = now
        self._turns.append(flow)

    def send(self, now: float) -> set[Flow]:
        """Put on their way the bytes whose time is near; gives the flows that had a turn."""
        sent = set()
        while self._turns and self._free_at < now + AHEAD:
            flow = self._turns.popleft()
            self._take_turn(flow)
            sent.add(flow)
            if self._may_send(flow):
                self._turns.append(flow)
            else:
                flow.has_turn = False
        return sent

    def _may_send(self, flow: Flow) -> bool:
        has_room = flow.travelling_bytes < self._settings.travelling_bytes
        return flow.is_open and flow.is_waiting and has_room

    def _take_turn(self, flow: Flow) -> None:
        settings = self._settings
        budget = settings.piece_bytes
        while budget > 0 and flow.is_waiting:
            entered, piece = flow.take_waiting(budget)
            budget -= len(piece)
            start = max(self._free_at, entered, flow.ready_at)
            self._free_at = start + settings.seconds_for(len(piece))
            late = settings.jitter * self._random.random() if settings.jitter else 0.0
            flow.travel(self._carried(piece), self._free_at + settings.round_trip / 2 + late)

    def _carried(self, piece: memoryview) -> memoryview:
        """Change the bytes that the link corrupts."""
        if self._sound_bytes >= len(piece):
            self._sound_bytes -= len(piece)
            return piece
        changed = bytearray(piece)
        position = self._sound_bytes
        while position < len(changed):
            changed[position] ^= self._random.randrange(1, 256)
            position += 1 + self._draw_sound_bytes()
        self._sound_bytes = position - len(changed)
        return memoryview(changed)

    def _draw_sound_bytes(self) -> int:
        """Draw how many bytes stay sound before the next that does not: a geometric variable."""
        probability = self._settings.corruption
        if probability in (0, 1):
            return 0 if probability else _NEVER
        sound = math.log(1 - self._random.random()) / math.log1p(-probability)
        return int(min(sound, _NEVER))


def _with_a_byte_changed(chunk: bytes) -> bytes:
    middle = len(chunk) // 2
    return b"".join((chunk[:middle], bytes((chunk[middle] ^ 1,)), chunk[middle + 1 :]))
