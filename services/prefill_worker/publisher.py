"""Publishes the state of one attempt: stored, announced to decode, offered to the cache."""

from services.prefill_worker.metrics import PrefillMetrics
from shared.errors import AttemptEndedError
from shared.messages import SegmentDescriptor, SegmentReady
from shared.observability.timed import timed
from shared.state_transfer.prefix_caching import PrefixCaching
from shared.state_transfer.segment_codecs import SegmentCodecs
from shared.state_transfer.segment_coding import described
from shared.state_transfer.state_writer import WrittenSegment
from shared.streams.job_queue import Attempt
from shared.streams.state_store import StateStore


class StatePublisher:
    """Publishes segments in the order in which they come.

    Args:
        store: of the region.
        attempt: whose state it is.
        caching: None keeps nothing for other requests.
        codecs: learn from what is published.
        lease_seconds: for which the state is kept beyond each segment.
        metrics: count what is published.

    Attributes:
        announced: what the decode worker was told of, in its order.
    """

    def __init__(
        self,
        store: StateStore,
        attempt: Attempt,
        caching: PrefixCaching | None,
        codecs: SegmentCodecs,
        lease_seconds: float,
        metrics: PrefillMetrics,
    ) -> None:
        self.announced: list[SegmentDescriptor] = []
        self._store = store
        self._attempt = attempt
        self._caching = caching
        self._codecs = codecs
        self._lease_seconds = lease_seconds
        self._metrics = metrics

    async def publish(self, written: WrittenSegment) -> None:
        """Store a segment of this attempt's making, and make it known.

        Raises:
            StateStoreFullError: the store has no memory left for it.
            AttemptEndedError: the attempt may not announce anything any more.
        """
        request_id, segment = self._attempt.job.request_id, written.segment
        with timed("segment stored", request=request_id, **described(segment)):
            await self._store.write(request_id, segment, written.data)
        if self._is_handed_over(segment):
            try:
                await self.announce(segment)
            except AttemptEndedError:
                await self._store.discard(request_id, segment)
                raise
        await self._store.open_lease(request_id, self._lease_seconds)
        if self._caching is not None:
            await self._caching.offer(segment)
        self._codecs.measured(written)
        self._metrics.state_bytes.labels("raw").inc(segment.raw_bytes)
        self._metrics.state_bytes.labels("wire").inc(segment.wire_bytes)

    async def announce(self, segment: SegmentDescriptor) -> None:
        """Tell the decode worker of a segment that is stored.

        Raises:
            AttemptEndedError: the attempt may not announce anything any more.
        """
        epoch = self._attempt.epoch
        await self._store.announce(
            self._attempt.job.request_id, epoch, SegmentReady(epoch=epoch, segment=segment)
        )
        self.announced.append(segment)

    def _is_handed_over(self, segment: SegmentDescriptor) -> bool:
        """Decode continues from the end of the prompt; earlier snapshots are for other requests."""
        return segment.kind == "mla" or segment.stop == len(self._attempt.job.prompt)
