"""Ways to move a state from one place to another, each as a function that fills an empty state."""

from collections.abc import Callable, Mapping
from typing import Final

from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.state_blob.codecs import BF16_STATE, INT8_LATENT, RAW, ZSTD, Codec
from shared.state_blob.prefix_hash import PrefixNames, root
from shared.state_blob.segment import (
    EncodedSegment,
    SegmentIdentity,
    decode_latents,
    decode_snapshot,
    encode_latents,
    encode_snapshot,
)

Move = Callable[[RequestState, RequestState], None]
"""Fills an empty state with what another state of the same engine holds."""
Moves = Mapping[str, Move]
"""Ways to move a state, by name; each starts from the same one, computed once."""

HANDED_OVER: Final = "handed over"
CODECS: Final[Mapping[str, tuple[Codec, Codec]]] = {
    "raw": (RAW, RAW),
    "zstd": (ZSTD, ZSTD),
    "bf16-state": (ZSTD, BF16_STATE),
    "int8-latent": (INT8_LATENT, ZSTD),
    "bf16-state, int8-latent": (INT8_LATENT, BF16_STATE),
}
"""Of latents and of KDA states, by name."""


def by_export(source: RequestState, target: RequestState) -> None:
    """The move of a hand-over, without a codec: nothing is lost."""
    target.import_latents(0, source.export_latents(0, source.length))
    target.import_snapshot(source.snapshot())
    target.finish_import(source.length)


class ThroughSegments:
    """Moves states as segments of given codecs, as workers do.

    Attributes:
        moved_bytes: of all segments so far.
    """

    def __init__(self, engine: Engine, latent_codec: Codec, state_codec: Codec) -> None:
        self.moved_bytes = 0
        self._engine = engine
        self._latent_codec = latent_codec
        self._state_codec = state_codec

    def __call__(self, source: RequestState, target: RequestState) -> None:
        """See `Move`."""
        length, snapshot = source.length, source.snapshot()
        names = PrefixNames(root(self._engine.fingerprint), [0] * length)
        latents = source.export_latents(0, length)
        identity = self._identity(names, 0, length, len(latents))
        encoded = self._counted(encode_latents(identity, latents, self._latent_codec))
        data = memoryview(bytearray(encoded.data))
        target.import_latents(0, decode_latents(data, identity, self._engine.layout))
        target.import_snapshot(self._coded(names, snapshot))
        target.finish_import(length)

    def _coded(self, names: PrefixNames, snapshot: KdaSnapshot) -> KdaSnapshot:
        identity = self._identity(names, snapshot.length, snapshot.length, snapshot.layers)
        encoded = self._counted(encode_snapshot(identity, snapshot, self._state_codec))
        data = memoryview(bytearray(encoded.data))
        return decode_snapshot(data, identity, self._engine.layout)

    def _counted(self, encoded: EncodedSegment) -> EncodedSegment:
        self.moved_bytes += len(encoded.data)
        return encoded

    def _identity(self, names: PrefixNames, start: int, stop: int, layers: int) -> SegmentIdentity:
        return SegmentIdentity(
            fingerprint=self._engine.fingerprint,
            producer="quality",
            epoch=1,
            start=start,
            stop=stop,
            parent_hash=names.at(start),
            prefix_hash=names.at(stop),
            first_layer=0,
            layers=layers,
        )
