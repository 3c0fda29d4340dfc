"""The prefill worker's use of its region's prefix cache: begins where an earlier prompt got to."""

import asyncio
from dataclasses import dataclass
from typing import Final

import structlog

from services.prefill_worker.metrics import PrefillMetrics
from shared.errors import LostSegmentError, SegmentError, StateLostError
from shared.kimi_linear.request_state import RequestState
from shared.messages import PrefixNode, SegmentDescriptor
from shared.policy.prefill_plan import most_reusable_tokens
from shared.state_blob.prefix_hash import BLOCK_TOKENS, PrefixNames
from shared.state_transfer.state_import import StateImport
from shared.state_transfer.state_reader import StateReader
from shared.streams.prefix_index import PrefixIndex

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What was known of a prompt before its prefill."""

    tokens: int
    """Of which the state is restored."""
    latents: tuple[SegmentDescriptor, ...]
    """Segments that hold the latents of these tokens."""
    known: int | None
    """Tokens, in whole blocks, that the cache has seen in some prompt; None while it is closed."""


NOTHING_CACHED: Final = CachedPrefix(0, (), None)


class PrefixCache:
    """Restores the longest cached prefix of a prompt."""

    def __init__(self, index: PrefixIndex, reader: StateReader, metrics: PrefillMetrics) -> None:
        self._index = index
        self._reader = reader
        self._metrics = metrics

    async def restore(
        self, request_id: str, length: int, names: PrefixNames, state: RequestState
    ) -> CachedPrefix:
        """Bring the state of the longest cached prefix into an empty state.

        What it uses is kept for the request until its lease ends.

        Args:
            request_id: which holds a lease.
            length: of the prompt.
            names: of its prefixes.
            state: cleared, with room for the prompt.
        """
        usable = names.blocks[: most_reusable_tokens(length) // BLOCK_TOKENS]
        match = await self._index.match(usable, request_id)
        known = None if match.reason == "closed" else match.known_blocks * BLOCK_TOKENS
        outcome: str = match.reason
        cached = CachedPrefix(0, (), known)
        if match.hit:
            try:
                cached = await self._restore_nodes(match.hit, names, state, known)
            except StateLostError as lost:
                outcome = "lost"
                await self._forget(lost, match.hit)
                await asyncio.to_thread(state.clear)
        self._metrics.lookups.labels(outcome).inc()
        self._metrics.cached_tokens.inc(cached.tokens)
        return cached

    async def _restore_nodes(
        self,
        nodes: tuple[PrefixNode, ...],
        names: PrefixNames,
        state: RequestState,
        known: int | None,
    ) -> CachedPrefix:
        tokens = nodes[-1].latents.stop
        latents = tuple(node.latents for node in nodes)
        async with StateImport(lambda segment: self._reader.read(segment, names), state) as pieces:
            for segment in (*latents, *nodes[-1].snapshot):
                pieces.add(segment)
            await pieces.finish()
        await asyncio.to_thread(state.finish_import, tokens)
        return CachedPrefix(tokens, latents, known)

    async def _forget(self, lost: StateLostError, nodes: tuple[PrefixNode, ...]) -> None:
        """Take out what cannot be restored, or every later prompt would try it again."""
        log.warning("cached prefix lost", cause=type(lost).__name__, reason=str(lost))
        if isinstance(lost, LostSegmentError) and not isinstance(lost.cause, SegmentError):
            await self._index.forget_segment(lost.key, of_snapshot=lost.of_snapshot)
        else:  # a store that damages one segment is not believed in the others of the prefix
            await self._index.forget_segment(nodes[0].latents.key, of_snapshot=False)
