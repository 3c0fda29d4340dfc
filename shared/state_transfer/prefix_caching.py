"""Offers stored segments to a region's prefix cache, for the requests to come."""

from typing import Final

from shared.messages import PrefixNode, SegmentDescriptor
from shared.state_blob.prefix_hash import BLOCK_TOKENS, PrefixNames
from shared.streams.prefix_index import PrefixIndex

_OF_USE: Final = ("adopted", "known")


class PrefixCaching:
    """Offers the segments of one state, in the order in which they are stored.

    Args:
        index: of the region's cache.
        names: of the tokens whose state it is.
        owner: what the store keeps the segments for, until the cache has them.
        kda_layers: of the model, by which a snapshot is seen to be whole.
    """

    def __init__(self, index: PrefixIndex, names: PrefixNames, owner: str, kda_layers: int) -> None:
        self._index = index
        self._names = names
        self._owner = owner
        self._kda_layers = kda_layers
        self._pieces: list[SegmentDescriptor] = []
        self._stop = 0

    def takes(self, segment: SegmentDescriptor) -> bool:
        """Whether a segment is of a form that a cache can use: whole blocks."""
        return segment.start % BLOCK_TOKENS == 0 == segment.stop % BLOCK_TOKENS

    async def offer(self, segment: SegmentDescriptor) -> bool:
        """Give a stored segment to the cache; False if it has no use for it, nor for what follows.

        A cache has no use for segments while it is closed or full, or when it has not, or no
        longer, what comes before them.
        """
        if not self.takes(segment):
            return True
        if segment.kind == "kda":
            self._collect(segment)
            return await self._offer_snapshot()
        node = PrefixNode(
            parent=self._names.at(segment.start),
            blocks=self._names.blocks[segment.start // BLOCK_TOKENS : segment.stop // BLOCK_TOKENS],
            latents=segment,
        )
        if await self._index.add(node, self._owner) not in _OF_USE:
            return False
        self._stop = segment.stop
        return await self._offer_snapshot()

    def _collect(self, piece: SegmentDescriptor) -> None:
        if self._pieces and self._pieces[0].stop != piece.stop:
            self._pieces.clear()
        self._pieces.append(piece)

    async def _offer_snapshot(self) -> bool:
        """Give a snapshot to the cache when it is whole, and the latents up to it are there."""
        layers = sum(piece.layers for piece in self._pieces)
        if layers < self._kda_layers or self._pieces[0].stop != self._stop:
            return True
        pieces, name = tuple(self._pieces), self._names.at(self._stop)
        self._pieces.clear()
        return await self._index.add_snapshot(name, pieces, self._owner) in _OF_USE
