"""Ways to move a state from one place to another, each as a function that fills an empty state."""

from collections.abc import Callable, Mapping
from typing import Final

from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.state_blob.codecs import BF16_STATE, INT8_LATENT, RAW, ZSTD, Codec
from shared.state_blob.prefix_hash import PrefixNames
from shared.state_transfer.segment_coding import (
    LatentsPart,
    SegmentCoding,
    StatePart,
    descriptor_of,
    place,
)
from shared.streams import keys

Move = Callable[[RequestState, RequestState], None]
"""Fills an empty state with what another state of the same engine holds."""
Moves = Mapping[str, Move]
"""Ways to move a state, by name; each starts from the same one, computed once."""

_OWNER: Final = "benchmark"
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
        self._coding = SegmentCoding(engine.fingerprint, engine.layout)
        self._latent_codec = latent_codec
        self._state_codec = state_codec

    def __call__(self, source: RequestState, target: RequestState) -> None:
        """See `Move`."""
        names = self._coding.names((0,) * source.length, b"")
        latents = LatentsPart(0, source.length, source.export_latents(0, source.length))
        place(self._moved(latents, self._latent_codec, names), target)
        place(self._moved(source.snapshot(), self._state_codec, names), target)
        target.finish_import(source.length)

    def _moved(self, part: StatePart, codec: Codec, names: PrefixNames) -> StatePart:
        encoded = self._coding.encode(part, names, _OWNER, 1, codec)
        self.moved_bytes += len(encoded.data)
        segment = descriptor_of(part, encoded, codec, keys.segment(_OWNER, 1, 0), _OWNER, 1)
        return self._coding.decode(segment, memoryview(bytearray(encoded.data)), names)
