"""The prefix cache of a region: which nodes there are, and the segments that they own.

A node is adopted from the request that published it: its segments pass from that request's own list
to the index, so that the request's end deletes them no more. A request pins the nodes it uses for
as long as its state has a lease. What is evicted is for others to choose.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import msgpack
from redis.asyncio import Redis

from shared.errors import MessageError
from shared.messages import PrefixNode, SegmentDescriptor, decode, encode
from shared.policy.eviction import CachedNode
from shared.state_blob.prefix_hash import BLOCK_TOKENS
from shared.streams import keys
from shared.streams.scripts import run_script

MOST_BLOCKS: Final = 20_000
"""Blocks of a prompt that a match looks at; a longer prompt is matched as far as that."""

MOST_BLOCKS_OF_A_NODE: Final = 1024
MOST_PIECES: Final = 1024

PREFIX_MILLISECONDS: Final = 24 * 3600 * 1000
"""Time to live of a node's segments, and of the index, since they were last used."""

_GRACE_MILLISECONDS: Final = 5 * 60 * 1000
"""Left to a segment that nobody knows: it may belong to an index that is being rebuilt."""

_MARGIN: Final = 8
"""The capacity may be exceeded by this part until the next sweep."""

_FIELDS_AT_ONCE: Final = 500
_SEGMENTS_AT_ONCE: Final = 500
_NODES_AT_ONCE: Final = 256

MatchReason = Literal["hit", "unknown", "no_snapshot", "broken", "closed"]
"""What a match ended with; all but `hit` say why there is none.

`closed`: no kv_store shows a sign of life, so nothing is added. `unknown`: no node ends within the
prompt. `broken`: some do, but what is above them, or their segments, are gone. `no_snapshot`: there
are latents, but no state to continue from.
"""

Adoption = Literal["adopted", "known", "closed", "orphan", "lost", "full"]
"""What became of segments that were offered; all but `adopted` leave them with their request.

`known`: the node, or its snapshot, is there. `closed`: no kv_store shows a sign of life. `orphan`:
the node that they belong to is not there. `lost`: they are not there, or not that request's.
`full`: the cache is well over its capacity.
"""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache knows of one prompt."""

    hit: tuple[PrefixNode, ...]
    """From the root to the longest node with a snapshot; empty if there is none."""
    latents: tuple[PrefixNode, ...]
    """The longest chain from the root, with or without snapshot; it need not begin like `hit`."""
    known_blocks: int
    """Leading blocks that any node contains, which may be in the middle of one."""
    reason: MatchReason

    @property
    def hit_tokens(self) -> int:
        """Tokens that need not be prefilled."""
        return self.hit[-1].latents.stop if self.hit else 0

    @property
    def latent_tokens(self) -> int:
        """Tokens whose latents are there."""
        return self.latents[-1].latents.stop if self.latents else 0


@dataclass(frozen=True, slots=True)
class CacheAccount:
    """What the cache of a region holds."""

    nodes: int
    snapshots: int
    bytes: int
    capacity: int | None
    """In bytes; None while the cache is closed."""


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What happened since Redis has counted."""

    matches: Mapping[MatchReason, int]
    hit_tokens: int
    evicted_nodes: int
    evicted_snapshots: int


_REASONS: Final[tuple[MatchReason, ...]] = ("hit", "unknown", "no_snapshot", "broken", "closed")


class PrefixIndex:
    """One region's cache, seen by its prefill workers and its kv_store service."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    # --- the prefill worker ----------------------------------------------------------------

    async def match(self, names: Sequence[bytes], request_id: str | None) -> PrefixMatch:
        """Find the longest prefixes of a prompt, and keep them for a request.

        Args:
            names: of the prompt's whole blocks, shortest first; those after `MOST_BLOCKS` are not
                looked at.
            request_id: pins every node that is given, for as long as it has a lease, and marks them
                used. None only looks, which is not counted either.
        """
        answer = await run_script(
            self._redis,
            "match_prefix",
            [keys.PREFIX_INDEX, keys.PREFIX_OPEN, keys.PREFIX_COUNTS, _pins(request_id)],
            request_id or "",
            PREFIX_MILLISECONDS,
            keys.PREFIX_CHILDREN,
            keys.PREFIX_PINNED,
            *names[:MOST_BLOCKS],
        )
        reason, known_blocks, packed, hit, latents = answer
        try:
            nodes = [_read_node(message, pieces) for message, pieces in packed]
        except MessageError:  # written by another version: `verify` will forget it
            return PrefixMatch((), (), known_blocks, "broken")
        match = PrefixMatch(
            hit=tuple(nodes[position - 1] for position in reversed(hit)),
            latents=tuple(nodes[position - 1] for position in reversed(latents)),
            known_blocks=known_blocks,
            reason=cast("MatchReason", reason.decode()),
        )
        if _is_chain(match.hit, names) and _is_chain(match.latents, names):
            return match
        await self.forget(names[:MOST_BLOCKS])  # records that lie, with all that builds on them
        return PrefixMatch((), (), 0, "broken")

    async def add(self, node: PrefixNode, request_id: str | None) -> Adoption:
        """Take a node's latents over from the request that published them, and pin the node.

        Args:
            node: without a snapshot; at most `MOST_BLOCKS_OF_A_NODE` blocks.
            request_id: that the segment was published for, in any of its attempts. None takes one
                that no request owns, and pins nothing.

        Raises:
            ValueError: the node has a snapshot, or too many blocks.
        """
        if node.snapshot:
            raise ValueError("a snapshot is added to a node that is there")
        if len(node.blocks) > MOST_BLOCKS_OF_A_NODE:
            raise ValueError(f"{len(node.blocks)} blocks are over {MOST_BLOCKS_OF_A_NODE}")
        return await self._adopt(
            "add_prefix_node",
            request_id or keys.request_of(node.latents.key),
            request_id,
            _record_of_node(node),
            PREFIX_MILLISECONDS,
            keys.PREFIX_CHILDREN,
            keys.PREFIX_PINNED,
            _MARGIN,
            broken=lambda: self.forget([node.name]),
        )

    async def add_snapshot(
        self, name: bytes, pieces: Sequence[SegmentDescriptor], request_id: str | None
    ) -> Adoption:
        """Take a snapshot over from the request that published it, for a node that has none.

        Args:
            name: of the node at whose end it was taken.
            pieces: all of them, 1 to `MOST_PIECES`.
            request_id: that they were published for; None takes pieces that no request owns.

        Raises:
            ValueError: there are no pieces, or too many.
        """
        if not 1 <= len(pieces) <= MOST_PIECES:
            raise ValueError(f"a snapshot has 1 to {MOST_PIECES} pieces, not {len(pieces)}")
        return await self._adopt(
            "add_prefix_snapshot",
            request_id or keys.request_of(pieces[0].key),
            request_id,
            _record_of_snapshot(pieces),
            PREFIX_MILLISECONDS,
            keys.PREFIX_PINNED,
            _MARGIN,
            name,
            broken=lambda: self._remove_snapshot(name, evict=False),
        )

    async def _adopt(
        self,
        script: str,
        owner: str,
        request_id: str | None,
        *arguments: str | bytes | int,
        broken: Callable[[], Awaitable[object]],
    ) -> Adoption:
        """Offer segments; what is there in their place, but without its own, is removed first."""
        names = [
            keys.PREFIX_INDEX,
            keys.PREFIX_OPEN,
            keys.state_segments(owner),
            _pins(request_id),
        ]
        offered = (request_id or "", *arguments)
        outcome = await run_script(self._redis, script, names, *offered)
        if outcome == b"broken":
            await broken()
            outcome = await run_script(self._redis, script, names, *offered)
        return "lost" if outcome == b"broken" else cast("Adoption", outcome.decode())

    async def forget_segment(self, key: str, *, of_snapshot: bool) -> None:
        """Remove what a segment that was found lost or damaged belongs to.

        That is its node with all below, or the snapshot that it is a piece of. What has taken its
        place meanwhile is left alone.
        """
        name: Any = await self._redis.hget(keys.PREFIX_INDEX, f"segment:{key}")
        if name is None:
            return
        if of_snapshot:
            await self._remove_snapshot(name, evict=False)
        else:
            await self.forget([name])

    async def forget(self, names: Sequence[bytes]) -> int:
        """Remove nodes that were found lost or damaged, and all below; gives their number."""
        forgotten = 0
        left = list(names)
        while left:
            removed, children = await self._remove(left[:_NODES_AT_ONCE], evict=False)
            forgotten += removed
            left = left[_NODES_AT_ONCE:] + children
        return forgotten

    # --- the kv_store service --------------------------------------------------------------

    async def open(self, capacity: int, seconds: float) -> None:
        """Show a sign of life: nodes are added up to `capacity` bytes for so many seconds."""
        await run_script(
            self._redis, "open_prefix", [keys.PREFIX_OPEN], capacity, int(seconds * 1000)
        )

    async def close(self) -> None:
        """Add no more nodes; what is there can still be used."""
        await self._redis.delete(keys.PREFIX_OPEN)

    async def evict(self, *names: bytes) -> int:
        """Remove nodes one after the other; gives the number of those that could be.

        One that is pinned, or has children when its turn comes, stays.
        """
        evicted = 0
        for first in range(0, len(names), _NODES_AT_ONCE):
            removed, _ = await self._remove(names[first : first + _NODES_AT_ONCE], evict=True)
            evicted += removed
        return evicted

    async def evict_snapshot(self, name: bytes) -> bool:
        """Remove a node's snapshot, unless there is none or the node is pinned."""
        return await self._remove_snapshot(name, evict=True)

    async def nodes(self) -> AsyncIterator[CachedNode]:
        """All nodes, each as it was at one moment while they were read."""
        seen: set[bytes] = set()
        cursor = 0
        while True:
            answer = await run_script(
                self._redis,
                "survey_prefix_nodes",
                [keys.PREFIX_INDEX, keys.STATE_LEASES],
                cursor,
                _FIELDS_AT_ONCE,
                keys.PREFIX_CHILDREN,
                keys.PREFIX_PINNED,
            )
            cursor = int(answer[0])
            for fields in answer[1]:
                if fields[0] not in seen:  # a scan may come across a field twice
                    seen.add(fields[0])
                    yield _read_summary(fields)
            if cursor == 0:
                return

    async def account(self) -> CacheAccount:
        """What is held now."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hmget(keys.PREFIX_INDEX, ["nodes", "snapshots", "bytes"])
        pipeline.get(keys.PREFIX_OPEN)
        totals, capacity = await pipeline.execute()
        nodes, snapshots, held = (int(total or 0) for total in totals)
        return CacheAccount(nodes, snapshots, held, None if capacity is None else int(capacity))

    async def counts(self) -> CacheCounts:
        """What happened so far."""
        found: Any = await self._redis.hgetall(keys.PREFIX_COUNTS)
        return CacheCounts(
            matches={reason: int(found.get(reason.encode(), 0)) for reason in _REASONS},
            hit_tokens=int(found.get(b"hit_tokens", 0)),
            evicted_nodes=int(found.get(b"evicted_nodes", 0)),
            evicted_snapshots=int(found.get(b"evicted_snapshots", 0)),
        )

    async def verify(self, cursor: int) -> tuple[int, int]:
        """Look at some nodes, and forget those that are not whole any more.

        Args:
            cursor: 0, or where the look before ended.

        Returns:
            Where to look next, 0 after the last; and the number of nodes and snapshots forgotten.
        """
        next_cursor, messages, nodes, snapshots = await run_script(
            self._redis, "find_lost_prefixes", [keys.PREFIX_INDEX], cursor, _FIELDS_AT_ONCE
        )
        unreadable = [name for name, message in messages if not _is_readable(message)]
        forgotten = await self.forget([*nodes, *unreadable])
        for name in snapshots:
            forgotten += await self._remove_snapshot(name, evict=False)
        return int(next_cursor), forgotten

    async def collect_orphans(self, cursor: int) -> tuple[int, int]:
        """Find segments that neither the index nor a request knows; they expire after some minutes.

        Args:
            cursor: 0, or where the look before ended.

        Returns:
            Where to look next, 0 after the last; and the number of segments found.
        """
        answer: Any = await self._redis.scan(
            cursor, match=keys.ANY_SEGMENT, count=_SEGMENTS_AT_ONCE
        )
        next_cursor, found = answer
        arguments: list[str] = []
        for segment in (key.decode() for key in found):
            request_id = keys.request_of(segment)
            arguments += segment, keys.state_segments(request_id), request_id
        orphans = await run_script(
            self._redis,
            "expire_orphan_segments",
            [keys.PREFIX_INDEX, keys.STATE_LEASES],
            _GRACE_MILLISECONDS,
            *arguments,
        )
        return int(next_cursor), int(orphans)

    async def _remove(self, names: Sequence[bytes], *, evict: bool) -> tuple[int, list[bytes]]:
        removed, children = await run_script(
            self._redis,
            "remove_prefix_nodes",
            [keys.PREFIX_INDEX, keys.STATE_LEASES, keys.PREFIX_COUNTS],
            int(evict),
            keys.PREFIX_CHILDREN,
            keys.PREFIX_PINNED,
            *names,
        )
        return int(removed), children

    async def _remove_snapshot(self, name: bytes, *, evict: bool) -> bool:
        removed = await run_script(
            self._redis,
            "remove_prefix_snapshot",
            [keys.PREFIX_INDEX, keys.STATE_LEASES, keys.PREFIX_COUNTS],
            int(evict),
            keys.PREFIX_PINNED,
            name,
        )
        return bool(removed)


def _is_chain(nodes: Sequence[PrefixNode], names: Sequence[bytes]) -> bool:
    """Whether nodes follow each other from the first block on, and are of these blocks."""
    stop = 0
    for node in nodes:
        start, stop_before = node.latents.start, stop
        stop = node.latents.stop
        last_block, rest = divmod(stop, BLOCK_TOKENS)
        if start != stop_before or stop <= start or rest or last_block > len(names):
            return False
        if node.name != names[last_block - 1]:
            return False
        if any(piece.stop != stop for piece in node.snapshot):
            return False
    return True


def _pins(request_id: str | None) -> str:
    return keys.prefix_pins(request_id or "")


def _record_of_node(node: PrefixNode) -> bytes:
    """The message with the fields that scripts read beside it: they have no reader of messages."""
    fields = {
        "parent": node.parent,
        "blocks": node.blocks,
        "latents": _fields_of_segment(node.latents),
        "message": encode(node),
    }
    return cast("bytes", msgpack.packb(fields, use_bin_type=False))


def _record_of_snapshot(pieces: Sequence[SegmentDescriptor]) -> bytes:
    fields = [_fields_of_segment(piece) | {"message": encode(piece)} for piece in pieces]
    return cast("bytes", msgpack.packb(fields, use_bin_type=False))


def _fields_of_segment(segment: SegmentDescriptor) -> dict[str, object]:
    return segment.model_dump(include={"key", "start", "stop", "wire_bytes"})


def _read_node(message: bytes, pieces: Sequence[bytes]) -> PrefixNode:
    node = decode(message, PrefixNode)
    if not pieces:
        return node
    snapshot = tuple(decode(piece, SegmentDescriptor) for piece in pieces)
    return node.model_copy(update={"snapshot": snapshot})


def _is_readable(message: bytes) -> bool:
    try:
        decode(message, PrefixNode)
    except MessageError:
        return False
    return True


def _read_summary(fields: Sequence[Any]) -> CachedNode:
    (
        name,
        parent,
        start,
        stop,
        latent_bytes,
        snapshot_bytes,
        used,
        snapshot_used,
        pinned,
        children,
    ) = fields
    return CachedNode(
        name=name,
        parent=parent,
        start=start,
        stop=stop,
        latent_bytes=latent_bytes,
        snapshot_bytes=snapshot_bytes,
        last_use=used,
        snapshot_last_use=snapshot_used,
        pinned=bool(pinned),
        children=children,
    )
