"""Segments that hold real tensors, published as a prefill worker does."""

import torch

from shared.kimi_linear.snapshot import KdaSnapshot
from shared.messages import PrefixNode, SegmentDescriptor
from shared.state_blob.prefix_hash import BLOCK_TOKENS
from shared.state_blob.segment import (
    EncodedSegment,
    SegmentIdentity,
    encode_latents,
    encode_snapshot,
)
from shared.streams import keys
from shared.streams.prefix_index import PrefixIndex
from shared.streams.state_store import StateStore
from tests.streams.cached_prompts import Request, name, names

LAYERS = 4


async def publish(
    request: Request, prompt: str, start: int, piece: KdaSnapshot | None
) -> SegmentDescriptor:
    """Publish what a prefill worker would: latents from `start` on, or a piece of a snapshot."""
    identity = SegmentIdentity(
        fingerprint="model",
        producer=request.request_id,
        epoch=request.attempt.epoch,
        start=start * BLOCK_TOKENS,
        stop=len(prompt) * BLOCK_TOKENS,
        parent_hash=name(prompt[:start]),
        prefix_hash=name(prompt),
        first_layer=piece.first_layer if piece else 0,
        layers=piece.layers if piece else 2,
    )
    encoded = _encode(identity, piece)
    descriptor = SegmentDescriptor(
        key=keys.segment(request.request_id, request.attempt.epoch, len(request.numbers)),
        kind=encoded.kind,
        producer=request.request_id,
        epoch=request.attempt.epoch,
        first_layer=identity.first_layer,
        layers=identity.layers,
        codec="zstd",
        start=identity.start,
        stop=identity.stop,
        wire_bytes=len(encoded.data),
        raw_bytes=encoded.raw_bytes,
        checksum=encoded.checksum,
    )
    request.numbers.append(len(request.numbers))
    store = StateStore(request.redis, "prefill")
    await store.write(request.request_id, descriptor, encoded.data)
    return descriptor


def _encode(identity: SegmentIdentity, piece: KdaSnapshot | None) -> EncodedSegment:
    if piece is not None:
        return encode_snapshot(identity, piece)
    return encode_latents(identity, torch.randn(2, identity.stop - identity.start, 8))


async def cache(request: Request, index: PrefixIndex, prompt: str, start: int = 0) -> PrefixNode:
    """Add a node with a snapshot in two pieces."""
    latents = await publish(request, prompt, start, None)
    node = PrefixNode(
        parent=name(prompt[:start]), blocks=tuple(names(prompt)[start:]), latents=latents
    )
    whole = KdaSnapshot(
        len(prompt) * BLOCK_TOKENS, torch.randn(LAYERS, 1, 4, 4), torch.randn(LAYERS, 12, 3)
    )
    halves = whole.split(whole.recurrent[:2].nbytes + whole.convolution[:2].nbytes)
    assert len(halves) == 2
    pieces = [await publish(request, prompt, len(prompt), half) for half in halves]
    assert await index.add(node, request.request_id) == "adopted"
    assert await index.add_snapshot(node.name, pieces, request.request_id) == "adopted"
    return node.model_copy(update={"snapshot": tuple(pieces)})
