"""Takes each layer's KDA state as soon as it is final, while the layers behind are computed."""

from collections.abc import Callable, Sequence
from typing import Final

from shared.kimi_linear.config import LayerKind
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot

_LEAST_PIECE_BYTES: Final = 2**20
"""Smaller pieces cost more round trips than they save."""


class SnapshotCollector:
    """Makes pieces of a snapshot, in the thread that computes.

    Args:
        state: whose last tokens are on their way through the layers.
        length: of the state when they have passed them all.
        kinds: of all layers.
        take: given each piece.
    """

    def __init__(
        self,
        state: RequestState,
        length: int,
        kinds: Sequence[LayerKind],
        take: Callable[[KdaSnapshot], object],
    ) -> None:
        self._state = state
        self._length = length
        self._kinds = kinds
        self._take = take
        self._taken = 0
        self._passed = 0

    def passed(self, layer: int) -> None:
        """Note that the tokens have passed a layer, counted from 0, one after the other."""
        layout = self._state.layout
        self._passed += self._kinds[layer] == "kda"
        layers = range(self._taken, self._passed)
        is_last = self._passed == layout.kda_layers
        if layers and (is_last or len(layers) * layout.kda_layer_bytes >= _LEAST_PIECE_BYTES):
            self._take(self._state.snapshot_of(layers, self._length))
            self._taken = self._passed
