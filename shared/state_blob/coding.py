"""Lossless codings between the bytes of a tensor's elements and a payload; they know no tensors.

A coding is an immutable value without shared contexts, so one may be used from many threads at
once; the heavy work of all of them runs without the interpreter lock.
"""

from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from shared.errors import SegmentPayloadError

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview
ByteArray: TypeAlias = npt.NDArray[np.uint8]

ALIGNMENT: Final = 8
"""Of elements in memory, in bytes: what the widest of them needs."""

_PART_BYTES: Final = 2**18
"""Of a plane, decompressed at a time: they are spread while the processor's cache has them."""


_LEAST_BLOCKS: Final = 8
_MEAN_BLOCK_BYTES: Final = 1024
"""A frame has at most the former number of blocks, and one more for each of the latter of content:
zstd makes them a hundred times larger, and what walks over them should not take long."""
_BLOCK_OF_ONE_BYTE: Final = 1
"""The type of a block that repeats one byte: its size is not that of its encoding."""


class Coding(Protocol):
    """A lossless encoding of elements of equal size."""

    def encode(self, elements: ReadableBuffer, element_bytes: int) -> ReadableBuffer:
        """Encode little-endian elements of `element_bytes` (1, 2, 4 or 8) bytes each.

        The result may be `elements` itself.
        """

    def decode(self, payload: ReadableBuffer, raw_bytes: int, element_bytes: int) -> ByteArray:
        """Decode exactly `raw_bytes` bytes into a writable array of them, aligned to `ALIGNMENT`.

        The result may be a view of the payload. A payload of any other size is refused before
        memory is spent on it.

        Raises:
            SegmentPayloadError: the payload does not decode to `raw_bytes` bytes.
        """


@dataclass(frozen=True, slots=True)
class RawCoding:
    """The elements as they are."""

    def encode(self, elements: ReadableBuffer, element_bytes: int) -> ReadableBuffer:
        """See `Coding.encode`."""
        return elements

    def decode(self, payload: ReadableBuffer, raw_bytes: int, element_bytes: int) -> ByteArray:
        """See `Coding.decode`; a view wherever the payload is writable and aligned."""
        if len(payload) != raw_bytes:
            raise SegmentPayloadError(f"payload has {len(payload)} bytes, not {raw_bytes}")
        view = np.frombuffer(payload, np.uint8)
        return view if view.flags.writeable and view.ctypes.data % ALIGNMENT == 0 else view.copy()


@dataclass(frozen=True, slots=True)
class ZstdCoding:
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

    def __post_init__(self) -> None:
        """Refuse now what zstd would refuse, or silently adjust, while encoding."""
        if not (1 <= self.level <= 19 and 6 <= self.hash_log <= 30):
            raise ValueError(f"{self} is outside of level 1 to 19 and hash_log 6 to 30")

    def encode(self, elements: ReadableBuffer, element_bytes: int) -> ReadableBuffer:
        """See `Coding.encode`; no elements become an empty payload."""
        if not len(elements):
            return b""
        parameters = zstandard.ZstdCompressionParameters.from_level(
            self.level, source_size=len(elements), min_match=7, hash_log=self.hash_log
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        return compressor.compress(_split_planes(elements, element_bytes))

    def decode(self, payload: ReadableBuffer, raw_bytes: int, element_bytes: int) -> ByteArray:
        """See `Coding.decode`; the result is the only large memory it takes."""
        if not raw_bytes:
            return RawCoding().decode(payload, raw_bytes, element_bytes)
        try:
            _check_frame(payload, raw_bytes)
            return _decompress(payload, raw_bytes, element_bytes)
        except zstandard.ZstdError as error:
            raise SegmentPayloadError(f"payload is not the frame it should be: {error}") from None


def _split_planes(elements: ReadableBuffer, element_bytes: int) -> ReadableBuffer:
    """Turn `[n]` little-endian elements into `[element_bytes, n]` planes, lowest byte first."""
    if element_bytes == 1:
        return elements
    words = np.frombuffer(elements, f"<u{element_bytes}")
    planes = np.empty((element_bytes, len(words)), np.uint8)
    for index, plane in enumerate(planes):
        np.right_shift(words, 8 * index, out=plane, casting="unsafe")
    return planes.data


def _check_frame(payload: ReadableBuffer, raw_bytes: int) -> None:
    """Refuse, before it costs memory, what is not one frame that declares the wanted size."""
    parameters = zstandard.get_frame_parameters(payload)
    if parameters.content_size != raw_bytes:
        raise SegmentPayloadError(
            f"payload declares {parameters.content_size} bytes, not {raw_bytes}"
        )
    frame_bytes = _blocks_stop(payload, raw_bytes) + (4 if parameters.has_checksum else 0)
    if frame_bytes != len(payload):
        raise SegmentPayloadError(f"payload has {len(payload)} bytes, its frame {frame_bytes}")


def _blocks_stop(payload: ReadableBuffer, raw_bytes: int) -> int:
    """Where the last block of a frame ends by its headers (RFC 8878, section 3.1.1.2)."""
    stop = zstandard.frame_header_size(payload)
    for _ in range(_LEAST_BLOCKS + raw_bytes // _MEAN_BLOCK_BYTES):
        header = int.from_bytes(payload[stop : stop + 3], "little")
        last, block_type, size = header & 1, header >> 1 & 3, header >> 3
        stop += 3 + (1 if block_type == _BLOCK_OF_ONE_BYTE else size)
        if last:
            return stop
    raise SegmentPayloadError(f"payload has too many blocks for {raw_bytes} bytes, or no last one")


def _decompress(payload: ReadableBuffer, raw_bytes: int, element_bytes: int) -> ByteArray:
    """Decompress planes, each part of them straight to its place among the elements.

    So what a frame can cost is bounded by the result and zstd's window, which is never larger than
    the declared content.
    """
    elements = np.empty(raw_bytes // element_bytes, f"<u{element_bytes}")
    with zstandard.ZstdDecompressor().stream_reader(payload) as reader:
        if element_bytes == 1:
            _fill(reader, elements.data)
        else:
            _join_planes(reader, elements)
        if reader.read(1):  # verifies zstd's own checksum, too, where there is one
            raise SegmentPayloadError(f"payload decodes to more than {raw_bytes} bytes")
    return elements.view(np.uint8)


def _join_planes(
    reader: zstandard.ZstdDecompressionReader, elements: npt.NDArray[np.unsignedinteger]
) -> None:
    """Put the bytes of planes, lowest first, into the elements; whole words are what is fast."""
    part = np.empty(min(_PART_BYTES, len(elements)), np.uint8)
    shifted = np.empty(len(part), elements.dtype)
    for index in range(elements.itemsize):
        for start in range(0, len(elements), len(part)):
            words = elements[start : start + len(part)]
            _fill(reader, part[: len(words)].data)
            if index:
                shifted[: len(words)] = part[: len(words)]
                shifted <<= 8 * index
                words |= shifted[: len(words)]
            else:
                words[:] = part[: len(words)]


def _fill(reader: zstandard.ZstdDecompressionReader, buffer: memoryview) -> None:
    while buffer:
        count = reader.readinto(buffer)
        if not count:
            raise SegmentPayloadError("payload decodes to fewer bytes than it declares")
        buffer = buffer[count:]
