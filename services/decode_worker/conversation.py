"""What decode adds to a state, published so that the next turn of the conversation begins there.

An answer is a prefix, too: the next prompt contains it. Its latents, and the KDA state at its last
whole block, go to the store that prefills begin from, and to the decode side's own.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from redis.exceptions import RedisError
from torch import Tensor

from services.decode_worker.metrics import DecodeMetrics
from shared.errors import PrfaasError, StateStoreFullError
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.policy.segment_size import SEGMENT_BYTES, cut_latents
from shared.process import new_identity
from shared.state_transfer.prefix_caching import PrefixCaching
from shared.state_transfer.segment_codecs import SegmentCodecs
from shared.state_transfer.segment_coding import LatentsPart, SegmentCoding, StatePart
from shared.state_transfer.state_writer import StateWriter, WrittenSegment
from shared.streams.connection import PASSING_ERRORS
from shared.streams.prefix_index import PrefixIndex
from shared.streams.state_store import StateStore

log = structlog.get_logger()

_MOST_WAITING: Final = 4
"""Conversations held in memory until they are published; further ones are not."""

_LEASE_SECONDS: Final = 300


@dataclass(frozen=True, slots=True)
class Conversation:
    """The end of the state of a prompt with its answer.

    Attributes:
        tokens: of prompt and answer, in whole blocks.
        tenant: salt of the prefixes' names.
        start: tokens that the stores have already: the whole blocks of the prompt.
        latents: of the tokens from there on, `[mla_layers, tokens - start, latent_dim]`.
        snapshot: after the last token.
    """

    tokens: tuple[int, ...]
    tenant: bytes
    start: int
    latents: Tensor
    snapshot: KdaSnapshot

    @property
    def raw_bytes(self) -> int:
        """Of all that is written, before it is coded."""
        tensors = (self.latents, self.snapshot.recurrent, self.snapshot.convolution)
        return sum(tensor.nbytes for tensor in tensors)

    def parts(self) -> list[StatePart]:
        """What has to be written, in its order."""
        return [
            *(
                LatentsPart(start, stop, self.latents[:, start - self.start : stop - self.start])
                for start, stop in cut_latents(self.start, len(self.tokens))
            ),
            *self.snapshot.split(SEGMENT_BYTES),
        ]


@dataclass(frozen=True, slots=True)
class CachedRegion:
    """A region whose prefix cache conversations are offered to.

    Attributes:
        store: of the region.
        index: of its prefix cache.
        prefills: whether anybody there begins from a snapshot; latents alone spare transfers.
    """

    store: StateStore
    index: PrefixIndex
    prefills: bool


class ConversationPublisher:
    """Publishes conversations one after the other, beside the decoding of others."""

    def __init__(
        self,
        regions: Sequence[CachedRegion],
        coding: SegmentCoding,
        codecs: SegmentCodecs,
        metrics: DecodeMetrics,
    ) -> None:
        self._regions = regions
        self._coding = coding
        self._codecs = codecs
        self._metrics = metrics
        self._waiting: asyncio.Queue[Conversation] = asyncio.Queue(maxsize=_MOST_WAITING)

    def offer(self, conversation: Conversation) -> None:
        """Have a conversation published in time; it is dropped when too many wait."""
        try:
            self._waiting.put_nowait(conversation)
        except asyncio.QueueFull:
            self._metrics.conversations.labels("dropped").inc()

    async def run(self) -> None:
        """Publish for as long as the caller lives."""
        while True:
            conversation = await self._waiting.get()
            try:
                await self._publish(conversation)
            except (*PASSING_ERRORS, RedisError, PrfaasError) as error:
                log.warning("conversation not published", error=type(error).__name__)
                self._metrics.conversations.labels("failed").inc()
            finally:
                self._waiting.task_done()

    async def finish(self, patience: float) -> None:
        """Wait until nothing is left to publish, for at most `patience` seconds."""
        try:
            async with asyncio.timeout(patience):
                await self._waiting.join()
        except TimeoutError:
            log.warning("conversations not published", left=self._waiting.qsize())

    async def _publish(self, conversation: Conversation) -> None:
        owner = new_identity("conversation")
        names = await asyncio.to_thread(
            self._coding.names, conversation.tokens, conversation.tenant
        )
        offers = [
            _Offer(
                region,
                PrefixCaching(region.index, names, owner, conversation.snapshot.layers),
                owner,
            )
            for region in self._regions
        ]

        async def write(written: WrittenSegment) -> None:
            for offer in offers:
                await offer.write(written)

        codec_of = await self._codecs.chosen(conversation.raw_bytes)
        writer = StateWriter(self._coding, names, owner, 1, codec_of, write)
        try:
            for offer in offers:
                await offer.begin()
            parts: asyncio.Queue[StatePart | None] = asyncio.Queue()
            for part in (*conversation.parts(), None):
                parts.put_nowait(part)
            await writer.write_all(parts)
        finally:
            for offer in offers:
                await offer.end()
        self._metrics.conversations.labels(_outcome(offers)).inc()


class _Offer:
    """One conversation offered to one region, until that has no use for it or fails.

    Attributes:
        wanted: whether the region has taken everything so far.
    """

    def __init__(self, region: CachedRegion, caching: PrefixCaching, owner: str) -> None:
        self.wanted = True
        self._region = region
        self._caching = caching
        self._owner = owner

    async def begin(self) -> None:
        """Hold what will be written, until the cache has it."""
        await self._try(self._region.store.open_lease(self._owner, _LEASE_SECONDS))

    async def write(self, written: WrittenSegment) -> None:
        """Store a segment and offer it to the cache."""
        segment = written.segment
        if self.wanted and (segment.kind == "mla" or self._region.prefills):
            await self._try(self._store_and_offer(written))

    async def end(self) -> None:
        """Delete what the cache has not taken; if that cannot be done now, its lease runs out."""
        await self._try(self._region.store.release(self._owner))

    async def _store_and_offer(self, written: WrittenSegment) -> None:
        await self._region.store.write(self._owner, written.segment, written.data)
        self.wanted = await self._caching.offer(written.segment)

    async def _try(self, step: Awaitable[object]) -> None:
        try:
            await step
        except (*PASSING_ERRORS, RedisError, StateStoreFullError) as error:
            log.warning("conversation not published", error=type(error).__name__)
            self.wanted = False


def _outcome(offers: Sequence[_Offer]) -> str:
    return "published" if all(offer.wanted for offer in offers) else "refused"
