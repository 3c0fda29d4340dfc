"""The decode side's own prefix cache: latents that crossed the network once need not do so again.

Pulled segments are kept in the serving region's store as they came. A later prompt with the same
beginning takes the latents from there, and pulls the rest.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog
from redis.exceptions import RedisError

from services.decode_worker.metrics import DecodeMetrics
from shared.errors import LostSegmentError, StateLostError, StateStoreFullError
from shared.kimi_linear.request_state import RequestState
from shared.messages import PrefixNode
from shared.process import new_identity
from shared.state_blob.prefix_hash import PrefixNames
from shared.state_transfer.prefix_caching import PrefixCaching
from shared.state_transfer.state_import import Imported, StateImport, nothing_more
from shared.state_transfer.state_reader import ReadSegment, StateReader
from shared.streams import keys
from shared.streams.connection import PASSING_ERRORS
from shared.streams.prefix_index import PrefixIndex
from shared.streams.state_store import StateStore

log = structlog.get_logger()

_TROUBLE: Final = (*PASSING_ERRORS, RedisError)
"""Whatever it is, requests go on without this cache."""

_PATIENCE: Final = 2.0
"""Seconds that the region may take for a command; without it everything is pulled."""


@dataclass(frozen=True, slots=True)
class RegionCopy:
    """What this region has of one prompt's latents.

    Attributes:
        covered: tokens whose latents are in the state already.
        keep: keeps segments that are pulled beyond them.
    """

    covered: int
    keep: Imported


NO_COPY: Final = RegionCopy(0, nothing_more)


class RegionCache:
    """The prefix cache of a decode worker's own region; its trouble only costs bandwidth."""

    def __init__(
        self,
        store: StateStore,
        index: PrefixIndex,
        reader: StateReader,
        lease_seconds: float,
        metrics: DecodeMetrics,
    ) -> None:
        self._store = store
        self._index = index
        self._reader = reader
        self._lease_seconds = lease_seconds
        self._metrics = metrics
        self._leased: set[str] = set()

    @asynccontextmanager
    async def copy(self, names: PrefixNames, state: RequestState) -> AsyncIterator[RegionCopy]:
        """Bring the latents that this region has into a cleared state, and complete its copy.

        What is used is kept while the block runs, and what is pulled meanwhile is the cache's at
        its end, or gone.
        """
        # A name of its own: two requests may bring the same segments at the same time.
        owner = new_identity("copy")
        self._leased.add(owner)
        try:
            yield await self._begun(owner, names, state)
        finally:
            self._leased.discard(owner)
            await self._try(self._store.release(owner))  # or its lease runs out

    async def renew_leases(self) -> None:
        """Keep for longer what is in use; called again and again."""
        if self._leased:
            await self._try(self._store.renew_leases(list(self._leased), self._lease_seconds))

    async def _begun(self, owner: str, names: PrefixNames, state: RequestState) -> RegionCopy:
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._store.open_lease(owner, self._lease_seconds)
                match = await self._index.match(names.blocks, owner)
            covered = await self._restore(match.latents, names, state)
        except _TROUBLE as error:
            log.warning("own region's cache unavailable", error=type(error).__name__)
            return NO_COPY
        self._metrics.local_tokens.inc(covered)
        if match.reason == "closed":
            return RegionCopy(covered, nothing_more)
        keeper = _Keeper(
            self._store, owner, PrefixCaching(self._index, names, owner, state.layout.kda_layers)
        )
        return RegionCopy(covered, keeper.keep)

    async def _restore(
        self, nodes: tuple[PrefixNode, ...], names: PrefixNames, state: RequestState
    ) -> int:
        try:
            async with StateImport(
                lambda segment: self._reader.read(segment, names), state
            ) as pieces:
                for node in nodes:
                    pieces.add(node.latents)
                await pieces.finish()
        except StateLostError as lost:
            log.warning("cached latents lost", cause=type(lost).__name__, reason=str(lost))
            if isinstance(lost, LostSegmentError):
                await self._index.forget_segment(lost.key, of_snapshot=lost.of_snapshot)
            await asyncio.to_thread(state.clear)
            return 0
        return nodes[-1].latents.stop if nodes else 0

    async def _try(self, command: Awaitable[object]) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await command
        except _TROUBLE as error:
            log.warning("own region's cache unavailable", error=type(error).__name__)


class _Keeper:
    """Keeps the segments of one pull, until the region has no use for them."""

    def __init__(self, store: StateStore, owner: str, caching: PrefixCaching) -> None:
        self._store = store
        self._owner = owner
        self._caching = caching
        self._numbered = 0
        self._is_of_use = True

    async def keep(self, read: ReadSegment) -> None:
        """Keep a segment of latents; a snapshot is of use to those only who prefill."""
        if not self._is_of_use or read.segment.kind != "mla":
            return
        if not self._caching.takes(read.segment):
            return
        key = keys.segment(self._owner, 1, self._numbered)
        self._numbered += 1
        segment = read.segment.model_copy(update={"key": key})
        try:
            await self._store.write(self._owner, segment, read.data)
            self._is_of_use = await self._caching.offer(segment)
        except (*_TROUBLE, StateStoreFullError) as error:
            log.warning("pulled segment not kept", error=type(error).__name__)
            self._is_of_use = False
