"""What a kv_store does again and again: end what nobody holds, keep the cache whole and bounded."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import structlog
from redis.asyncio import Redis

from services.kv_store.metrics import KvStoreMetrics
from shared.policy.eviction import CachedNode, choose_evictions
from shared.settings import KvStoreSettings
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import PrefixIndex
from shared.streams.prefix_rebuilding import rebuild
from shared.streams.state_store import StateStore

log = structlog.get_logger()

_MOST_EXPIRED_AT_ONCE: Final = 100
_SWEEPS_OF_LIFE: Final = 8
"""Sweeps for which the cache stays open after the last one."""
_EVICTS_JOBS: Final = "allkeys"
"""Beginning of the policies by which a full Redis gives up keys without a time to live, too."""
_DEFAULT_CAPACITY: Final = 2**30
_HEADROOM: Final = 16
"""A cache that is over its capacity is emptied by this part more, not to be over it at once."""


class Sweeper:
    """The states and the prefix cache of one region's Redis."""

    def __init__(
        self,
        redis: Redis,
        store: StateStore,
        index: PrefixIndex,
        links: LinkStatistics,
        settings: KvStoreSettings,
        metrics: KvStoreMetrics,
    ) -> None:
        self._redis = redis
        self._store = store
        self._index = index
        self._links = links
        self._settings = settings
        self._metrics = metrics
        self._state_cursor = 0
        self._segment_cursor = 0
        self._node_cursor = 0
        self._has_nodes = True
        self._has_warned = False

    async def sweep(self) -> None:
        """Do everything once, then rest, unless there is more to do."""
        await self._open()
        expired = await self._end_states()  # what makes room comes before what may need it
        await self._tend_cache()
        await self.evict_to_capacity()
        await self._rebuild_if_lost()
        await self._measure()
        if expired < _MOST_EXPIRED_AT_ONCE:
            await asyncio.sleep(self._settings.sweep_interval)

    async def evict_to_capacity(self) -> int:
        """Evict what is worth least if the cache is over its capacity; gives freed bytes."""
        account = await self._index.account()
        if account.capacity is None or account.bytes <= account.capacity:
            return 0
        excess = account.bytes - account.capacity + account.capacity // _HEADROOM
        nodes = [node async for node in self._index.nodes()]
        freed = await self._evict(nodes, excess)
        log.info("cache evicted", freed_bytes=freed, wanted_bytes=excess)
        return freed

    async def drop_unpinned(self) -> int:
        """Evict everything that can be; gives freed bytes."""
        nodes = [node async for node in self._index.nodes()]
        most = sum(node.latent_bytes + node.snapshot_bytes for node in nodes)
        return await self._evict(nodes, most + 1)

    async def _open(self) -> None:
        default = await self._default_capacity()
        await self._index.open(
            self._settings.capacity or default, _SWEEPS_OF_LIFE * self._settings.sweep_interval
        )

    async def _rebuild_if_lost(self) -> None:
        """Make the index anew if it is empty and was not, or may not have been, before."""
        nodes = (await self._index.account()).nodes
        if self._has_nodes and not nodes:
            nodes = await rebuild(self._redis, self._index)
            log.info("cache rebuilt", nodes=nodes)
        self._has_nodes = nodes > 0

    async def _default_capacity(self) -> int:
        memory: Any = await self._redis.info("memory")
        policy = str(memory.get("maxmemory_policy", ""))
        if policy.startswith(_EVICTS_JOBS) and not self._has_warned:
            self._has_warned = True
            log.warning("redis may evict jobs; noeviction or volatile-lru keep them", policy=policy)
        return int(memory.get("maxmemory", 0)) // 2 or _DEFAULT_CAPACITY

    async def _end_states(self) -> int:
        """Delete states that nobody holds; gives the number of leases that had run out."""
        expired = await self._store.expire(_MOST_EXPIRED_AT_ONCE)
        self._state_cursor, orphans = await self._store.collect_orphans(self._state_cursor)
        if expired or orphans:
            log.info("states deleted", expired=expired, orphans=orphans)
            self._metrics.expired.inc(len(expired) + len(orphans))
        return len(expired)

    async def _tend_cache(self) -> None:
        """Forget some of what Redis has lost, and find some of what nobody knows."""
        self._node_cursor, forgotten = await self._index.verify(self._node_cursor)
        self._segment_cursor, orphans = await self._index.collect_orphans(self._segment_cursor)
        if forgotten or orphans:
            log.info("cache repaired", forgotten=forgotten, orphans=orphans)
            self._metrics.forgotten.inc(forgotten)
            self._metrics.orphans.inc(orphans)

    async def _evict(self, nodes: Sequence[CachedNode], bytes_to_free: int) -> int:
        """Evict what is worth least, as far as that is still possible; gives freed bytes."""
        now = await self._now()
        # For a hundred thousand nodes it takes seconds, in which the service has to answer.
        evictions = await asyncio.to_thread(choose_evictions, nodes, bytes_to_free, now)
        freed = 0
        for eviction in evictions:
            done = (
                await self._index.evict_snapshot(eviction.name)
                if eviction.snapshot_only
                else await self._index.evict(eviction.name)
            )
            freed += eviction.freed_bytes if done else 0
        return freed

    async def _now(self) -> int:
        """Time of Redis, in ms."""
        seconds, microseconds = await self._redis.time()
        return seconds * 1000 + microseconds // 1000

    async def _measure(self) -> None:
        self._metrics.show_states(await self._store.account())
        self._metrics.show_cache(await self._index.account(), await self._index.counts())
        self._metrics.show_links(await self._links.read_all())
