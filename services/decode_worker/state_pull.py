"""Follows the prefill of one request and pulls its state, segment by segment, as it is announced.

Every wait has an end: silence is held against the state of the prefill job, and a state that cannot
come any more is reported as lost, for the caller to have it computed again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final, TypeVar

import structlog
from torch import Tensor

from shared.errors import (
    CancelledJobError,
    GenerationError,
    SegmentForeignError,
    StateLostError,
    UnavailableError,
)
from shared.job_state import JobState
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.messages import (
    Job,
    Manifest,
    PrefillDone,
    PrefillEvent,
    PrefillFailed,
    PrefillStarted,
    SegmentDescriptor,
    SegmentReady,
)
from shared.state_blob.prefix_hash import PrefixHasher, root
from shared.state_blob.segment import SegmentIdentity, checksum_of, decode_latents, decode_snapshot
from shared.streams.connection import PASSING_ERRORS
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateStore

log = structlog.get_logger()

_DONE_BUT_SILENT: Final = 3.0
"""Seconds after which a prefill that is done without a word has lost its announcements."""

_RETRY_PAUSE: Final = 0.2

Answer = TypeVar("Answer")


class StatePull:
    """One try at getting the state of a prompt.

    The steps are `begun`, `manifest` and `restore`, in this order; `epoch` is the latest attempt
    that was seen, and pieces of earlier ones are dropped.
    """

    def __init__(
        self,
        job: Job,
        queue: JobQueue,
        store: StateStore,
        fingerprint: str,
        layout: StateLayout,
        stall_timeout: float,
        after_epoch: int,
    ) -> None:
        self.epoch = after_epoch
        self.raw_bytes = 0
        self.wire_bytes = 0
        self._job = job
        self._queue = queue
        self._store = store
        self._fingerprint = fingerprint
        self._layout = layout
        self._stall_timeout = stall_timeout
        self._after_epoch = after_epoch
        self._reader = store.events(job.request_id)
        self._unread: list[PrefillEvent] = []
        self._announced: list[SegmentDescriptor] = []
        self._pulled: dict[str, Tensor | KdaSnapshot] = {}

    async def begun(self) -> None:
        """Wait until there is something to pull.

        Raises:
            StateLostError, GenerationError, CancelledJobError, UnavailableError: see `manifest`.
        """
        while not self._announced:
            await self._follow()

    async def manifest(self) -> Manifest:
        """Pull what is announced until the state is complete, and give what closes it.

        Raises:
            StateLostError: the state, or the prefill that makes it, is gone or stuck.
            GenerationError: the prefill was given up.
            CancelledJobError: the request was cancelled.
            UnavailableError: the prefill region does not answer.
        """
        while True:
            await self._pull_announced()
            manifest = await self._follow()
            if manifest is not None:
                break
        if manifest.fingerprint != self._fingerprint:
            raise SegmentForeignError(
                f"state of model {manifest.fingerprint}, this worker runs {self._fingerprint}"
            )
        self._announced = list(manifest.segments)
        return manifest

    async def restore(self, state: RequestState) -> None:
        """Pull what is still missing, and put the whole into a state of this worker's own.

        Raises:
            StateLostError: a segment is gone, damaged, or not all of the prompt is covered.
        """
        await self._pull_announced()
        await asyncio.to_thread(self._import_into, state)

    # --- following the announcements -------------------------------------------------------

    async def _follow(self) -> Manifest | None:
        """Take in one announcement; gives the manifest once it comes."""
        event = await self._next_event()
        match event:
            case PrefillFailed(epoch=epoch, reason=reason) if epoch > self._after_epoch:
                raise GenerationError(reason)
            case PrefillStarted(epoch=epoch) if epoch > self._after_epoch:
                self.epoch = epoch
                self._announced.clear()
                self._pulled.clear()
            case SegmentReady(epoch=self.epoch, segment=segment) if self._current:
                self._announced.append(segment)
            case PrefillDone(epoch=self.epoch, manifest=manifest) if self._current:
                return manifest
        return None

    @property
    def _current(self) -> bool:
        """Whether the attempt that is followed is one that may still be used."""
        return self.epoch > self._after_epoch

    async def _next_event(self) -> PrefillEvent:
        silent_since = monotonic()
        while not self._unread:
            self._unread = await self._patiently(self._reader.read)
            if not self._unread:
                silent_since = await self._checked_silence(silent_since)
        return self._unread.pop(0)

    async def _checked_silence(self, since: float) -> float:
        """Judge a silence by the standing of the prefill; gives from when on it counts.

        A job that waits for its turn, or whose worker lives, is silent for a good reason.
        """
        state, worker_alive = await self._patiently(
            lambda: self._queue.standing(self._job.request_id)
        )
        silence = monotonic() - since
        match state:
            case JobState.QUEUED:
                return monotonic()
            case JobState.RUNNING if worker_alive:
                return monotonic()
            case JobState.RUNNING if silence < self._stall_timeout:
                return since
            case JobState.DONE if silence < _DONE_BUT_SILENT:
                return since
            case JobState.CANCELLED:
                raise CancelledJobError("the prefill was cancelled")
            case JobState.FAILED | JobState.DEAD:
                raise GenerationError("the prefill was given up")
            case _:
                what = "unknown to its region" if state is None else f"{state} but silent"
                raise StateLostError(f"the prefill is {what}")

    async def _patiently(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Ask the prefill region, and ask again while it is out of reach, for a limited time."""
        since = monotonic()
        while True:
            try:
                return await ask()
            except PASSING_ERRORS as error:
                if monotonic() - since > self._stall_timeout:
                    raise UnavailableError("the prefill region does not answer") from error
                log.warning("prefill region unavailable", error=type(error).__name__)
                await asyncio.sleep(_RETRY_PAUSE)

    # --- pulling ---------------------------------------------------------------------------

    async def _pull_announced(self) -> None:
        for segment in self._announced:
            if segment.key not in self._pulled:
                self._pulled[segment.key] = await self._pull(segment)

    async def _pull(self, segment: SegmentDescriptor) -> Tensor | KdaSnapshot:
        data = await self._patiently(lambda: self._store.fetch(segment))
        self.raw_bytes += segment.raw_bytes
        self.wire_bytes += len(data)
        return await asyncio.to_thread(self._decode, segment, data)

    def _decode(self, segment: SegmentDescriptor, data: bytearray) -> Tensor | KdaSnapshot:
        if checksum_of(data) != segment.checksum:
            raise SegmentForeignError("the segment is not the one that was announced")
        hasher = PrefixHasher(root(self._fingerprint))
        hasher.update(self._job.prompt[: segment.stop])
        identity = SegmentIdentity(
            fingerprint=self._fingerprint,
            request_id=self._job.request_id,
            epoch=self.epoch,
            start=segment.start,
            stop=segment.stop,
            prefix_hash=hasher.digest(),
        )
        if segment.kind == "mla":
            return decode_latents(data, identity, self._layout)
        return decode_snapshot(data, identity, self._layout)

    def _import_into(self, state: RequestState) -> None:
        state.clear()
        covered = 0
        snapshot: KdaSnapshot | None = None
        for segment in self._announced:
            part = self._pulled[segment.key]
            if isinstance(part, KdaSnapshot):
                snapshot = part
            elif segment.start == covered:
                state.import_latents(part)
                covered = segment.stop
        length = len(self._job.prompt)
        if covered != length or snapshot is None or snapshot.length != length:
            raise StateLostError(f"the published state does not cover the {length} prompt tokens")
        state.import_snapshot(snapshot)
