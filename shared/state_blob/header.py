"""The header and metadata of segments: what one is, whose it is, and what its tensors are.

The byte format is written down in FORMAT.md beside this file. What is here knows no tensors, so
that services that hold none can tell segments apart.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Final, Literal, TypeAlias

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import (
    SegmentForeignError,
    SegmentMagicError,
    SegmentMetadataError,
    SegmentPayloadError,
    SegmentTooLargeError,
    SegmentTruncatedError,
    SegmentVersionError,
)
from shared.messages import Epoch, Identifier, PrefixName
from shared.state_blob.codecs import Codec, codec_with_wire_id
from shared.state_blob.coding import ALIGNMENT, ReadableBuffer
from shared.state_blob.kinds import KIND_IDS, SegmentKind, kind_with_id

MAGIC: Final = b"PRFS"
FORMAT_VERSION: Final = 2
MAX_RAW_BYTES: Final = 2**30
"""Limit of the bytes of a segment's tensors together."""
MAX_PAYLOAD_BYTES: Final = MAX_RAW_BYTES + MAX_RAW_BYTES // 128
"""Limit of the encoded tensors: what does not compress may grow a little."""
MAX_METADATA_BYTES: Final = 64 * 2**10
PAYLOAD_ALIGNMENT: Final = 64
"""The payload starts at a multiple of it, counted from the segment's first byte."""

CHECKSUM_BYTES: Final = 16
MAC_BYTES: Final = 32

_PREAMBLE: Final = struct.Struct("<4sHBBIIQ")
"""Magic, format version, kind, codec, flags, metadata length, payload length."""
CHECKSUM_START: Final = _PREAMBLE.size
MAC_START: Final = CHECKSUM_START + CHECKSUM_BYTES
HEADER_BYTES: Final = MAC_START + MAC_BYTES
MOST_BYTES_BEFORE_PAYLOAD: Final = (
    -(-(HEADER_BYTES + MAX_METADATA_BYTES) // PAYLOAD_ALIGNMENT) * PAYLOAD_ALIGNMENT
)
"""What `read_identity` needs at most."""

_SIGNED: Final = 1
"""Flag: the segment has a MAC."""

ElementDType: TypeAlias = Literal["float32", "bfloat16", "int8"]
ELEMENT_BYTES: Final[dict[ElementDType, int]] = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class SegmentIdentity:
    """Whose state a segment holds, and which part of it."""

    fingerprint: str
    """Of the model's configuration and weights."""
    producer: str
    """The request that it was written for, which need not be the one that uses it."""
    epoch: int
    """The attempt of that request, counted from 1."""
    start: int
    """First token covered; a KDA snapshot covers none: its start is its stop, and its length."""
    stop: int
    parent_hash: bytes
    """Name of the tokens [0, start), 16 bytes: see `prefix_hash.py`."""
    prefix_hash: bytes
    """Name of the tokens [0, stop), 16 bytes."""
    first_layer: int
    """First KDA layer covered, counted among the KDA layers; 0 for latents."""
    layers: int
    """Layers of its kind covered; for latents all of them."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a segment say."""

    kind: SegmentKind
    codec: Codec
    signed: bool
    metadata_bytes: int
    payload_bytes: int

    @property
    def metadata_stop(self) -> int:
        """Where the metadata ends and the padding begins."""
        return HEADER_BYTES + self.metadata_bytes

    @property
    def payload_start(self) -> int:
        """Where the padding ends and the payload begins."""
        return _aligned(self.metadata_stop, PAYLOAD_ALIGNMENT)

    @property
    def segment_bytes(self) -> int:
        """Of the whole segment."""
        return self.payload_start + self.payload_bytes


_Size = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorEntry(_Strict):
    """One tensor of a segment, as it is stored."""

    name: Annotated[str, Field(max_length=64)]
    dtype: Annotated[str, Field(max_length=64)]
    shape: Annotated[tuple[_Size, ...], Field(max_length=8)]
    wire_bytes: _Size


class Metadata(_Strict):
    """What a segment says of itself behind its header."""

    fingerprint: Identifier
    producer: Identifier
    epoch: Epoch
    start: _Size
    stop: _Size
    parent_hash: PrefixName
    prefix_hash: PrefixName
    first_layer: _Size
    layers: Annotated[int, Field(ge=1)]
    raw_bytes: _Size
    tensors: tuple[TensorEntry, ...]

    @property
    def identity(self) -> SegmentIdentity:
        """Whose state it is."""
        return SegmentIdentity(
            **{field.name: getattr(self, field.name) for field in fields(SegmentIdentity)}
        )

    def places(self) -> Iterator[slice]:
        """Where in the payload each tensor is: as near to the one before as alignment allows."""
        stop = 0
        for entry in self.tensors:
            start = _aligned(stop, ALIGNMENT)
            stop = start + entry.wire_bytes
            yield slice(start, stop)


# --- writing ---------------------------------------------------------------------------------


def pack_header(header: Header) -> bytes:
    """The header up to the checksum."""
    return _PREAMBLE.pack(
        MAGIC,
        FORMAT_VERSION,
        KIND_IDS[header.kind],
        header.codec.wire_id,
        _SIGNED if header.signed else 0,
        header.metadata_bytes,
        header.payload_bytes,
    )


def pack_metadata(
    kind: SegmentKind, identity: SegmentIdentity, raw_bytes: int, tensors: tuple[TensorEntry, ...]
) -> bytes:
    """The metadata as msgpack.

    Raises:
        ValueError: no reader would accept the identity.
    """
    metadata = Metadata(**asdict(identity), raw_bytes=raw_bytes, tensors=tensors)
    _check_range(kind, metadata)
    packed: bytes = msgpack.packb(metadata.model_dump())
    return packed


def padded(size: int, alignment: int) -> bytes:
    """The zero bytes that go behind `size` bytes for the next to be aligned."""
    return bytes(_aligned(size, alignment) - size)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# --- reading ---------------------------------------------------------------------------------


def read_identity(data_prefix: ReadableBuffer) -> tuple[SegmentKind, SegmentIdentity, str, int]:
    """Read what a segment says of itself, of which only the beginning is at hand.

    Neither checksum nor MAC can be verified, so this is for finding segments, not for using them.

    Args:
        data_prefix: the first `MOST_BYTES_BEFORE_PAYLOAD` bytes of the segment, or fewer if it, or
            its metadata, ends before.

    Returns:
        Its kind, its identity, the name of its codec, and the bytes of its state before encoding.

    Raises:
        SegmentError: the subclass names the first check that failed, in the order of FORMAT.md.
    """
    segment = memoryview(data_prefix).cast("B")
    header = read_header(segment)
    if not header.metadata_stop <= len(segment) <= header.segment_bytes:
        raise SegmentTruncatedError(
            f"{len(segment)} bytes are no beginning of a segment of {header.segment_bytes} with "
            f"its metadata until {header.metadata_stop}"
        )
    metadata = read_metadata(header, segment)
    return header.kind, metadata.identity, header.codec.name, metadata.raw_bytes


def read_header(segment: memoryview) -> Header:
    """Check what can be known of a segment without reading beyond its header.

    Raises:
        SegmentError: truncated, or magic, version, kind, codec, flags or sizes are not as they
            should be.
    """
    if len(segment) < HEADER_BYTES:
        raise SegmentTruncatedError(f"segment of {len(segment)} bytes has no whole header")
    magic, version, kind_id, codec_id, flags, metadata_bytes, payload_bytes = _PREAMBLE.unpack_from(
        segment
    )
    if magic != MAGIC:
        raise SegmentMagicError(f"segment starts with {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise SegmentVersionError(f"segment has format version {version}, not {FORMAT_VERSION}")
    kind, codec = kind_with_id(kind_id), codec_with_wire_id(codec_id)
    if kind not in codec.kinds:
        raise SegmentVersionError(f"codec {codec.name} is not one for segments of kind {kind}")
    if flags & ~_SIGNED:
        raise SegmentVersionError(f"segment has flags {flags:#x}, of which some are not known")
    if metadata_bytes > MAX_METADATA_BYTES:
        raise SegmentTooLargeError(f"{metadata_bytes} bytes of metadata > {MAX_METADATA_BYTES}")
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise SegmentTooLargeError(f"{payload_bytes} bytes of payload > {MAX_PAYLOAD_BYTES}")
    return Header(kind, codec, bool(flags & _SIGNED), metadata_bytes, payload_bytes)


def read_whole_header(segment: memoryview) -> Header:
    """As `read_header`, of a segment that has to end where its header says.

    Raises:
        SegmentError: see `read_header`.
    """
    header = read_header(segment)
    if len(segment) != header.segment_bytes:
        raise SegmentTruncatedError(f"segment has {len(segment)} bytes, not {header.segment_bytes}")
    return header


def checksum_of(data: ReadableBuffer) -> bytes:
    """The checksum a segment carries, not verified: whether it is the announced one.

    Raises:
        SegmentError: the header is damaged.
    """
    segment = memoryview(data).cast("B")
    read_whole_header(segment)
    return bytes(segment[CHECKSUM_START:MAC_START])


def read_metadata(header: Header, segment: memoryview) -> Metadata:
    """Check and read the metadata, and the padding behind it as far as it is there.

    Raises:
        SegmentMetadataError: it is not what the format says it is.
        SegmentTooLargeError: it declares too large a state.
    """
    if any(segment[header.metadata_stop : header.payload_start]):
        raise SegmentMetadataError("padding behind the metadata is not zero")
    metadata = _unpack_metadata(segment[HEADER_BYTES : header.metadata_stop])
    try:
        _check_range(header.kind, metadata)
    except ValueError as error:
        raise SegmentMetadataError(str(error)) from None
    tensors_stop = max((place.stop for place in metadata.places()), default=0)
    if tensors_stop != header.payload_bytes:
        raise SegmentMetadataError(
            f"tensors end after {tensors_stop} bytes, the payload after {header.payload_bytes}"
        )
    if metadata.raw_bytes > MAX_RAW_BYTES:
        raise SegmentTooLargeError(f"{metadata.raw_bytes} bytes of state > {MAX_RAW_BYTES}")
    return metadata


def check_identity(
    header: Header, metadata: Metadata, kind: SegmentKind, wanted: SegmentIdentity
) -> None:
    """Compare a segment's kind and identity with the wanted ones.

    Args:
        header: of the segment.
        metadata: of the segment.
        kind: that is wanted.
        wanted: the identity that is wanted.

    Raises:
        SegmentForeignError: they differ.
    """
    if header.kind != kind:
        raise SegmentForeignError(f"segment is of kind {header.kind}, not {kind}")
    for field in fields(SegmentIdentity):
        found, expected = getattr(metadata, field.name), getattr(wanted, field.name)
        if found != expected:
            raise SegmentForeignError(f"segment has {field.name} {found!r}, not {expected!r}")


def encoded_tensors(metadata: Metadata, payload: memoryview) -> list[memoryview]:
    """The encoded bytes of each tensor.

    Raises:
        SegmentPayloadError: what lies between them is not zero.
    """
    encoded: list[memoryview] = []
    stop = 0
    for place in metadata.places():
        if any(payload[stop : place.start]):
            raise SegmentPayloadError("padding between two tensors is not zero")
        encoded.append(payload[place])
        stop = place.stop
    return encoded


def _unpack_metadata(packed: memoryview) -> Metadata:
    try:
        unpacked = msgpack.unpackb(packed, use_list=False, object_pairs_hook=_unique_fields)
        return Metadata.model_validate(unpacked)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SegmentMetadataError(f"metadata: {where:.100}: {first['msg']}") from None
    except (ValueError, msgpack.UnpackException) as error:
        raise SegmentMetadataError(f"metadata is not msgpack: {error}") from None


def _check_range(kind: SegmentKind, metadata: Metadata) -> None:
    start, stop = metadata.start, metadata.stop
    if start > stop or (kind == "kda" and start != stop):
        raise ValueError(f"tokens from start {start} to stop {stop} are no range of a {kind}")
    if start == stop and metadata.parent_hash != metadata.prefix_hash:
        raise ValueError(f"parent_hash and prefix_hash are two names of the {stop} same tokens")
    if kind == "mla" and metadata.first_layer:
        raise ValueError(f"first_layer is {metadata.first_layer}, but latents are of all layers")


def _unique_fields(pairs: Iterable[tuple[object, object]]) -> dict[object, object]:
    """Refuse a repeated key, of which two readers might take different values."""
    unique: dict[object, object] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError("a key is repeated")
        unique[key] = value
    return unique
