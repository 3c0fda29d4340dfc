"""Makes the index of a prefix cache anew from the segments that are there when it was lost.

A segment names the prefix it belongs to and the one it begins at, but not the blocks between: of a
node that is made from it only the last block is known.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from redis.asyncio import Redis

from shared.errors import SegmentError
from shared.messages import PrefixNode, SegmentDescriptor
from shared.state_blob.header import (
    CHECKSUM_START,
    MAC_START,
    MOST_BYTES_BEFORE_PAYLOAD,
    read_header,
    read_identity,
)
from shared.state_blob.prefix_hash import BLOCK_TOKENS
from shared.streams import keys
from shared.streams.prefix_index import PrefixIndex

log = structlog.get_logger()

_SEGMENTS_AT_ONCE: Final = 64
"""Of each, the first 64 KiB are read."""


@dataclass(frozen=True, slots=True)
class _FoundSegment:
    descriptor: SegmentDescriptor
    fingerprint: str
    parent: bytes
    name: bytes


async def rebuild(redis: Redis, index: PrefixIndex) -> int:
    """Put the segments that no request owns into an open cache; gives the number of nodes made."""
    found = [segment async for segment in _find_segments(redis)]
    latents = [segment for segment in found if segment.descriptor.kind == "mla"]
    made = 0
    for segment in sorted(latents, key=lambda each: each.descriptor.start):  # parents come first
        node = PrefixNode(parent=segment.parent, blocks=(segment.name,), latents=segment.descriptor)
        made += await index.add(node, None) == "adopted"
    for name, pieces in _whole_snapshots(found):
        await index.add_snapshot(name, pieces, None)
    return made


async def _find_segments(redis: Redis) -> AsyncIterator[_FoundSegment]:
    """All segments of whole blocks that no request owns, as far as they can be read."""
    batch: list[str] = []
    async for key in redis.scan_iter(keys.ANY_SEGMENT, count=500):
        batch.append(key.decode())
        if len(batch) == _SEGMENTS_AT_ONCE:
            for segment in await _read_segments(redis, batch):
                yield segment
            batch = []
    for segment in await _read_segments(redis, batch):
        yield segment


async def _read_segments(redis: Redis, found: Iterable[str]) -> list[_FoundSegment]:
    unowned = await _unowned(redis, list(found))
    pipeline = redis.pipeline(transaction=False)
    for key in unowned:
        pipeline.getrange(key, 0, MOST_BYTES_BEFORE_PAYLOAD - 1)
        pipeline.strlen(key)
    answers: list[Any] = await pipeline.execute() if unowned else []
    segments: list[_FoundSegment] = []
    for key, head, size in zip(unowned, answers[::2], answers[1::2], strict=True):
        try:
            segment = _read_segment(key, head, size)
        except (SegmentError, ValueError) as error:
            log.info("segment left out of the cache", key=key, reason=str(error))
            continue
        if segment.descriptor.start % BLOCK_TOKENS == segment.descriptor.stop % BLOCK_TOKENS == 0:
            segments.append(segment)
    return segments


async def _unowned(redis: Redis, found: Sequence[str]) -> list[str]:
    pipeline = redis.pipeline(transaction=False)
    for key in found:
        pipeline.hexists(keys.state_segments(keys.request_of(key)), key)
    owned = await pipeline.execute() if found else []
    return [key for key, is_owned in zip(found, owned, strict=True) if not is_owned]


def _read_segment(key: str, head: bytes, size: int) -> _FoundSegment:
    """Describe a segment by its beginning.

    Raises:
        SegmentError: it is none.
        ValueError: it is not whole.
    """
    kind, identity, codec, raw_bytes = read_identity(head)
    if read_header(memoryview(head)).segment_bytes != size:
        raise ValueError(f"segment has {size} bytes, its header says otherwise")
    descriptor = SegmentDescriptor(
        key=key,
        kind=kind,
        producer=identity.producer,
        epoch=identity.epoch,
        first_layer=identity.first_layer,
        layers=identity.layers,
        codec=codec,
        start=identity.start,
        stop=identity.stop,
        wire_bytes=size,
        raw_bytes=raw_bytes,
        checksum=head[CHECKSUM_START:MAC_START],
    )
    return _FoundSegment(
        descriptor, identity.fingerprint, identity.parent_hash, identity.prefix_hash
    )


def _whole_snapshots(
    found: Iterable[_FoundSegment],
) -> list[tuple[bytes, tuple[SegmentDescriptor, ...]]]:
    """Snapshots of which every piece is there: they reach as far as the model's farthest does."""
    groups: dict[tuple[str, bytes, str, int], list[SegmentDescriptor]] = defaultdict(list)
    for segment in found:
        piece = segment.descriptor
        if piece.kind == "kda":
            group = (segment.fingerprint, segment.name, piece.producer, piece.epoch)
            groups[group].append(piece)
    all_layers: dict[str, int] = defaultdict(int)
    for (fingerprint, *_), pieces in groups.items():
        all_layers[fingerprint] = max(all_layers[fingerprint], _covered_layers(pieces))
    return [
        (name, tuple(sorted(pieces, key=lambda piece: piece.first_layer)))
        for (fingerprint, name, *_), pieces in groups.items()
        if _covered_layers(pieces) == all_layers[fingerprint] > 0
    ]


def _covered_layers(pieces: Iterable[SegmentDescriptor]) -> int:
    """Layers that pieces cover from the first on; 0 if they leave a gap or overlap."""
    covered = 0
    for piece in sorted(pieces, key=lambda piece: piece.first_layer):
        if piece.first_layer != covered:
            return 0
        covered += piece.layers
    return covered
