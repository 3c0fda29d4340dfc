"""Lossless codecs between the bytes of a tensor's elements and a payload; they know no tensors.

A codec is an immutable value without shared contexts, so one may be used from many threads at once;
the heavy work of all of them runs without the interpreter lock.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from shared.errors import SegmentPayloadError, SegmentVersionError

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview
ByteArray: TypeAlias = npt.NDArray[np.uint8]


class Codec(Protocol):
    """A named, lossless encoding of elements of equal size."""

    name: ClassVar[str]
    """How settings call it."""
    wire_id: ClassVar[int]
    """How a segment's header calls it, 0 to 255."""

    def encode(self, elements: ReadableBuffer, element_bytes: int) -> ReadableBuffer:
        """Encode little-endian elements of `element_bytes` (1, 2, 4 or 8) bytes each.

        The result may be `elements` itself.
        """

    def decode(self, payload: ReadableBuffer, raw_bytes: int, element_bytes: int) -> ByteArray:
        """Decode exactly `raw_bytes` bytes into a new, writable array of them.

        A payload of any other size is refused before memory is spent on it.

        Raises:
            SegmentPayloadError: the payload does not decode to `raw_bytes` bytes.
        """


@dataclass(frozen=True, slots=True)
class RawCodec:
    """The elements as they are."""

    name: ClassVar[str] = "raw"
    wire_id: ClassVar[int] = 0

    def encode(self, elements: ReadableBuffer, element_bytes: int) -> ReadableBuffer:
        """See `Codec.encode`."""
        return elements

    def decode(self, payload: ReadableBuffer, raw_bytes: int, element_bytes: int) -> ByteArray:
        """See `Codec.decode`."""
        if len(payload) != raw_bytes:
            raise SegmentPayloadError(f"payload has {len(payload)} bytes, not {raw_bytes}")
        return np.frombuffer(payload, np.uint8).copy()


@dataclass(frozen=True, slots=True)
class ZstdCodec:
    """One zstd frame over the planes of the elements: all lowest bytes first, all highest last.

    Exponents of floats take few values and mantissas all: apart, the exponents shrink to their
    entropy; mixed, hardly anything does. Planes of floats repeat nothing worth a search, and false
    matches cost more than the literals they replace. So the shortest match is long and the table
    of the search holds little but runs: faster and denser than zstd's own choice at any level.
    """

    level: int = 1
    """zstd level, 1 to 19."""
    hash_log: int = 6
    """Binary logarithm of the entries in the table of the search, 6 to 30."""
    name: ClassVar[str] = "zstd"
    wire_id: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse now what zstd would refuse, or silently adjust, while encoding."""
        if not (1 <= self.level <= 19 and 6 <= self.hash_log <= 30):
            raise ValueError(f"{self} is outside of level 1 to 19 and hash_log 6 to 30")

    def encode(self, elements: ReadableBuffer, element_bytes: int) -> ReadableBuffer:
        """See `Codec.encode`; no elements become an empty payload."""
        if not len(elements):
            return b""
        parameters = zstandard.ZstdCompressionParameters.from_level(
            self.level, source_size=len(elements), min_match=7, hash_log=self.hash_log
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        return compressor.compress(_split_planes(elements, element_bytes).data)

    def decode(self, payload: ReadableBuffer, raw_bytes: int, element_bytes: int) -> ByteArray:
        """See `Codec.decode`."""
        if not raw_bytes:
            return RawCodec().decode(payload, raw_bytes, element_bytes)
        return _join_planes(_decompress(payload, raw_bytes), element_bytes)


CODECS: Final[tuple[Codec, ...]] = (RawCodec(), ZstdCodec())
"""Every codec of this format, with its default parameters."""
DEFAULT_CODEC: Final[Codec] = ZstdCodec()


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


def _split_planes(elements: ReadableBuffer, element_bytes: int) -> ByteArray:
    """Turn `[n]` little-endian elements into `[element_bytes, n]` planes, lowest byte first."""
    words = np.frombuffer(elements, f"<u{element_bytes}")
    planes = np.empty((element_bytes, len(words)), np.uint8)
    for index, plane in enumerate(planes):
        np.right_shift(words, 8 * index, out=plane, casting="unsafe")
    return planes


def _join_planes(planes: bytes, element_bytes: int) -> ByteArray:
    """Turn `[element_bytes, n]` planes back into the bytes of `[n]` little-endian elements."""
    *lower, highest = np.frombuffer(planes, np.uint8).reshape(element_bytes, -1)
    words = highest.astype(f"<u{element_bytes}")
    for plane in reversed(lower):
        words <<= 8
        words |= plane
    return words.view(np.uint8)


def _decompress(payload: ReadableBuffer, raw_bytes: int) -> bytes:
    """Decompress one frame of exactly `raw_bytes` bytes.

    zstd allocates what the frame says it holds, and stops with an error once a frame holds anything
    else than it says; so the comparison of the two sizes bounds what a frame can cost.
    """
    try:
        declared = zstandard.get_frame_parameters(payload).content_size
        if declared != raw_bytes:
            raise SegmentPayloadError(f"payload declares {declared} bytes, not {raw_bytes}")
        return zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise SegmentPayloadError(f"payload is not the zstd frame it should be: {error}") from None
