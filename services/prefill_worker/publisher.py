"""Turns the parts of a state into segments, and writes them to the store in the order they come."""

import asyncio
from dataclasses import dataclass

from torch import Tensor

from services.prefill_worker.metrics import PrefillMetrics
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.messages import SegmentDescriptor
from shared.settings import PrefillWorkerSettings
from shared.state_blob.codecs import codec_named
from shared.state_blob.prefix_hash import PrefixHasher, root
from shared.state_blob.segment import (
    EncodedSegment,
    SegmentIdentity,
    encode_latents,
    encode_snapshot,
)
from shared.streams import keys
from shared.streams.job_queue import Attempt
from shared.streams.state_store import StateStore


@dataclass(frozen=True, slots=True)
class Latents:
    """MLA latents of the tokens [start, stop): `[mla_layers, stop - start, latent_dim]`."""

    start: int
    stop: int
    latents: Tensor


StatePart = Latents | KdaSnapshot


class StatePublisher:
    """Publishes the state of one attempt."""

    def __init__(
        self,
        store: StateStore,
        attempt: Attempt,
        fingerprint: str,
        settings: PrefillWorkerSettings,
        metrics: PrefillMetrics,
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._fingerprint = fingerprint
        self._codec = codec_named(settings.codec)
        self._lease = settings.state_lease
        self._metrics = metrics
        self._hasher = PrefixHasher(root(fingerprint))
        self._hashed = 0
        self._segments: list[SegmentDescriptor] = []

    async def publish_all(
        self, parts: asyncio.Queue[StatePart | None]
    ) -> tuple[SegmentDescriptor, ...]:
        """Publish parts until None comes; gives what was published."""
        while (part := await parts.get()) is not None:
            await self._publish(part)
        return tuple(self._segments)

    async def _publish(self, part: StatePart) -> None:
        request_id, epoch = self._attempt.job.request_id, self._attempt.epoch
        start, stop = (
            (part.start, part.stop) if isinstance(part, Latents) else (part.length, part.length)
        )
        encoded = await asyncio.to_thread(self._encode, part, self._identity(start, stop))
        segment = SegmentDescriptor(
            key=keys.segment(request_id, epoch, len(self._segments)),
            kind=encoded.kind,
            start=start,
            stop=stop,
            wire_bytes=len(encoded.data),
            raw_bytes=encoded.raw_bytes,
            checksum=encoded.checksum,
        )
        await self._store.publish(request_id, epoch, segment, encoded.data)
        await self._store.open_lease(request_id, self._lease)
        self._segments.append(segment)
        self._metrics.state_bytes.labels("raw").inc(segment.raw_bytes)
        self._metrics.state_bytes.labels("wire").inc(segment.wire_bytes)

    def _identity(self, start: int, stop: int) -> SegmentIdentity:
        self._hasher.update(self._attempt.job.prompt[self._hashed : stop])
        self._hashed = stop
        return SegmentIdentity(
            fingerprint=self._fingerprint,
            request_id=self._attempt.job.request_id,
            epoch=self._attempt.epoch,
            start=start,
            stop=stop,
            prefix_hash=self._hasher.digest(),
        )

    def _encode(self, part: StatePart, identity: SegmentIdentity) -> EncodedSegment:
        if isinstance(part, Latents):
            return encode_latents(identity, part.latents, self._codec)
        return encode_snapshot(identity, part, self._codec)
