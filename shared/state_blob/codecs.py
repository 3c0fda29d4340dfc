"""The codecs of segments by name: what is rounded in a state, and how the rest is coded.

It knows no tensors: services that hold none choose codecs, too.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from shared.errors import SegmentVersionError
from shared.state_blob.coding import Coding, RawCoding, ZstdCoding
from shared.state_blob.kinds import SegmentKind

RoundingName: TypeAlias = Literal["exact", "bf16-state", "int8-latent"]
"""What is lost, see `rounding.py`."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A named encoding of the tensors of a segment."""

    name: str
    """How settings and manifests call it."""
    wire_id: int
    """How a segment's header calls it, 0 to 255."""
    kinds: tuple[SegmentKind, ...]
    """The segments that it is for."""
    coding: Coding
    """Of what is left after rounding."""
    rounding: RoundingName = "exact"

    @property
    def lossless(self) -> bool:
        """Whether every bit comes back."""
        return self.rounding == "exact"


RAW: Final = Codec("raw", 0, ("mla", "kda"), RawCoding())
ZSTD: Final = Codec("zstd", 1, ("mla", "kda"), ZstdCoding())
BF16_STATE: Final = Codec("bf16-state", 2, ("kda",), ZstdCoding(), "bf16-state")
INT8_LATENT: Final = Codec("int8-latent", 3, ("mla",), ZstdCoding(), "int8-latent")

CODECS: Final[tuple[Codec, ...]] = (RAW, ZSTD, BF16_STATE, INT8_LATENT)
"""Every codec of this format."""
DEFAULT_CODEC: Final[Codec] = ZSTD


def codecs_for(kind: SegmentKind) -> tuple[Codec, ...]:
    """The codecs that segments of a kind may have."""
    return tuple(codec for codec in CODECS if kind in codec.kinds)


def codec_named(name: str) -> Codec:
    """Return the codec that settings call `name`.

    Raises:
        ValueError: there is none.
    """
    for codec in CODECS:
        if codec.name == name:
            return codec
    raise ValueError(f"no codec is called {name!r}; known: {', '.join(c.name for c in CODECS)}")


def codec_with_wire_id(wire_id: int) -> Codec:
    """Return the codec that a segment's header calls `wire_id`.

    Raises:
        SegmentVersionError: this reader knows none.
    """
    for codec in CODECS:
        if codec.wire_id == wire_id:
            return codec
    raise SegmentVersionError(f"segment has codec {wire_id}, which this reader does not know")
