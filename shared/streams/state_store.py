"""Published states in a region's Redis: segments, what announces them, and the lease they live by.

A prefill attempt writes each segment under a name of its own and then announces it, which Redis
allows to the latest attempt only. Whoever needs a state holds its lease; when no one renews it, the
kv_store service deletes the state. The time to live of every key is a backstop below that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from shared.errors import (
    CancelledJobError,
    MessageError,
    StateLostError,
    StateStoreFullError,
    SupersededError,
)
from shared.messages import (
    PrefillDone,
    PrefillEvent,
    PrefillFailed,
    PrefillStarted,
    SegmentDescriptor,
    SegmentReady,
    decode,
    encode,
)
from shared.streams import keys
from shared.streams.connection import BLOCK_MILLISECONDS, entries_of
from shared.streams.scripts import run_script

STATE_MILLISECONDS: Final = 2 * 3600 * 1000
"""Time to live of a state's keys, for a region whose kv_store service does not run."""

_ORPHANS_LOOKED_AT: Final = 500


@dataclass(frozen=True, slots=True)
class StateAccount:
    """What the published states of a region weigh."""

    states: int
    segments: int
    segment_bytes: int


class StateStore:
    """One region's store, seen by its writers, its readers and its kv_store service."""

    def __init__(self, redis: Redis, queue: str) -> None:
        self._redis = redis
        self._queue = queue

    # --- the prefill worker ----------------------------------------------------------------

    async def announce(self, request_id: str, epoch: int, event: PrefillEvent) -> None:
        """Tell the readers what the attempt has done.

        Raises:
            SupersededError: a later attempt has begun.
            CancelledJobError: the request was cancelled or has ended.
        """
        verdict = await run_script(
            self._redis,
            "announce",
            [keys.job_record(self._queue, request_id), keys.prefill_events(request_id)],
            epoch,
            encode(event),
            STATE_MILLISECONDS,
        )
        if verdict == b"superseded":
            raise SupersededError("another attempt prefills the request now")
        if verdict != b"ok":
            raise CancelledJobError(f"the request is {verdict.decode()}")

    async def write(self, owner: str, segment: SegmentDescriptor, data: bytes | memoryview) -> None:
        """Store a segment for an owner, with whose lease it ends.

        Raises:
            StateStoreFullError: Redis has no memory left for it.
        """
        index = keys.state_segments(owner)
        pipeline = self._redis.pipeline(transaction=True)  # no segment without its index
        pipeline.hset(index, segment.key, segment.wire_bytes)
        pipeline.pexpire(index, STATE_MILLISECONDS)
        pipeline.set(segment.key, data, px=STATE_MILLISECONDS)
        try:
            await pipeline.execute()
        except OutOfMemoryError:
            raise StateStoreFullError("the KV store has no memory left for a segment") from None

    async def discard(self, owner: str, segment: SegmentDescriptor) -> None:
        """Delete one segment of an owner."""
        await self._redis.unlink(segment.key)
        await self._redis.hdel(keys.state_segments(owner), segment.key)

    # --- the decode worker -----------------------------------------------------------------

    def events(self, request_id: str) -> "PrefillEvents":
        """What the prefill of a request announces, from its beginning."""
        return PrefillEvents(self._redis, request_id)

    # --- leases ----------------------------------------------------------------------------

    async def open_lease(self, request_id: str, seconds: float) -> None:
        """Keep a state, also one that does not exist yet, for some time."""
        await self._renew([request_id], seconds, may_be_new=True)

    async def renew_leases(self, request_ids: Sequence[str], seconds: float) -> list[str]:
        """Keep states for longer; gives those whose lease has run out before."""
        return await self._renew(request_ids, seconds, may_be_new=False)

    async def _renew(
        self, request_ids: Sequence[str], seconds: float, *, may_be_new: bool
    ) -> list[str]:
        gone = await run_script(
            self._redis,
            "renew_lease",
            [keys.STATE_LEASES],
            int(seconds * 1000),
            int(may_be_new),
            *request_ids,
        )
        return [request_id.decode() for request_id in gone]

    async def release(self, request_id: str) -> int:
        """Delete a state that nobody needs any more; gives the number of its segments."""
        return await self._delete(request_id, keep_leased=False)

    async def _delete(self, request_id: str, *, keep_leased: bool) -> int:
        names = [
            keys.STATE_LEASES,
            keys.state_segments(request_id),
            keys.prefill_events(request_id),
            keys.prefix_pins(request_id),
        ]
        deleted = await run_script(
            self._redis, "delete_state", names, request_id, int(keep_leased), keys.PREFIX_PINNED
        )
        return int(deleted)

    # --- the kv_store service --------------------------------------------------------------

    async def expire(self, most: int) -> list[str]:
        """Delete up to `most` states whose lease has run out; gives their requests."""
        expired = await run_script(self._redis, "expired_leases", [keys.STATE_LEASES], most)
        return await self._delete_unheld([request_id.decode() for request_id in expired])

    async def collect_orphans(self, cursor: int) -> tuple[int, list[str]]:
        """Delete states without any lease, looking at some of all states.

        A write that was under way when its state was released leaves such a state.

        Args:
            cursor: 0, or where the look before ended.

        Returns:
            Where to look next, 0 after the last; and the requests whose states were deleted.
        """
        answer: Any = await self._redis.scan(
            cursor, match=keys.state_segments("*"), count=_ORPHANS_LOOKED_AT
        )
        next_cursor, found = answer
        request_ids = [keys.request_of(index.decode()) for index in found]
        return int(next_cursor), await self._delete_unheld(request_ids)

    async def _delete_unheld(self, request_ids: list[str]) -> list[str]:
        return [
            request_id
            for request_id in request_ids
            if await self._delete(request_id, keep_leased=True) >= 0
        ]

    async def account(self) -> StateAccount:
        """Count the leased states, their segments and bytes."""
        request_ids: Any = await self._redis.zrange(keys.STATE_LEASES, 0, -1)
        pipeline = self._redis.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hvals(keys.state_segments(request_id.decode()))
        sizes = await pipeline.execute()
        return StateAccount(
            states=len(request_ids),
            segments=sum(len(of_one) for of_one in sizes),
            segment_bytes=sum(int(size) for of_one in sizes for size in of_one),
        )


class PrefillEvents:
    """The announcements of one request's prefill, in their order."""

    def __init__(self, redis: Redis, request_id: str) -> None:
        self._redis = redis
        self._stream = keys.prefill_events(request_id)
        self._last = "0-0"

    async def read(self) -> list[PrefillEvent]:
        """Wait a short while for the next announcements.

        Raises:
            StateLostError: an announcement is not one.
        """
        answer = await self._redis.xread(
            {self._stream: self._last}, count=64, block=BLOCK_MILLISECONDS
        )
        events: list[PrefillEvent] = []
        for entry, fields in entries_of(answer):
            self._last = entry
            events.append(_read_event(fields.get(b"event", b"")))
        return events


def _read_event(data: bytes) -> PrefillEvent:
    try:
        event = decode(data, PrefillStarted, SegmentReady, PrefillDone, PrefillFailed)
    except MessageError as error:
        raise StateLostError(f"announcement refused: {error}") from None
    return cast("PrefillEvent", event)
