"""State segments: the tensors of one piece of a request's state as self-describing, verified bytes.

The byte format is written down in FORMAT.md beside this file. A reader says what it expects, and
takes nothing else: it refuses with the `SegmentError` that names the first check that failed, and
checks everything that can be checked before it allocates memory for the tensors.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Annotated, Final, Literal, TypeAlias

import msgpack
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from shared.errors import (
    SegmentChecksumError,
    SegmentForeignError,
    SegmentMagicError,
    SegmentMetadataError,
    SegmentShapeError,
    SegmentTooLargeError,
    SegmentTruncatedError,
    SegmentVersionError,
)
from shared.kernels.dtypes import StateDType
from shared.kernels.torch_dtypes import TORCH_DTYPES
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import DTYPE_BYTES, StateLayout
from shared.messages import Epoch, Identifier
from shared.state_blob.codecs import DEFAULT_CODEC, Codec, ReadableBuffer, codec_with_wire_id

MAGIC: Final = b"PRFS"
FORMAT_VERSION: Final = 1
MAX_RAW_BYTES: Final = 2**30
"""Limit of the bytes of a segment's tensors together."""
MAX_PAYLOAD_BYTES: Final = MAX_RAW_BYTES + MAX_RAW_BYTES // 128
"""Limit of the encoded tensors: what does not compress may grow a little."""
MAX_METADATA_BYTES: Final = 64 * 2**10

SegmentKind: TypeAlias = Literal["mla", "kda"]
_KIND_IDS: Final[dict[SegmentKind, int]] = {"mla": 1, "kda": 2}

_PREAMBLE: Final = struct.Struct("<4sHBBIQ")
"""Magic, format version, kind, codec, metadata length, payload length."""
_CHECKSUM_BYTES: Final = 16
_HEADER_BYTES: Final = _PREAMBLE.size + _CHECKSUM_BYTES


@dataclass(frozen=True, slots=True)
class SegmentIdentity:
    """Whose state a segment holds, and which part of it."""

    fingerprint: str
    """Of the model's configuration and weights."""
    request_id: str
    epoch: int
    """The attempt that produced it, counted from 1."""
    start: int
    """First token covered; a KDA snapshot covers none: its start is its stop, and its length."""
    stop: int
    prefix_hash: bytes
    """Name of the tokens [0, stop), 16 bytes: see `prefix_hash.py`."""


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """A segment as it is stored, with what a manifest says of it."""

    data: bytes
    kind: SegmentKind
    raw_bytes: int
    """Bytes of the tensors before encoding."""
    checksum: bytes
    """xxh3_128 of everything in `data` but itself, 16 bytes."""


def encode_latents(
    identity: SegmentIdentity, latents: Tensor, codec: Codec = DEFAULT_CODEC
) -> EncodedSegment:
    """Encode the latents of all MLA layers for the tokens [identity.start, identity.stop).

    Args:
        identity: whose latents these are.
        latents: `[mla_layers, stop - start, latent_dim]`, fp32 or bf16, on any device, with any
            strides.
        codec: how the payload is encoded.

    Returns:
        A segment of kind `mla`.

    Raises:
        ValueError: identity or latents are not as described.
        SegmentTooLargeError: the latents are larger than `MAX_RAW_BYTES`.
    """
    tokens = identity.stop - identity.start
    if latents.ndim != 3 or latents.shape[1] != tokens:
        raise ValueError(f"latents {list(latents.shape)} do not cover {tokens} tokens")
    return _encode("mla", identity, {"latents": latents}, codec)


def encode_snapshot(
    identity: SegmentIdentity, snapshot: KdaSnapshot, codec: Codec = DEFAULT_CODEC
) -> EncodedSegment:
    """Encode the state of all KDA layers after identity.stop tokens.

    Args:
        identity: whose snapshot this is; start and stop are both its length.
        snapshot: its tensors fp32 or bf16, on any device, with any strides.
        codec: how the payload is encoded.

    Returns:
        A segment of kind `kda`.

    Raises:
        ValueError: identity or snapshot are not as described.
        SegmentTooLargeError: the snapshot is larger than `MAX_RAW_BYTES`.
    """
    if not identity.start == identity.stop == snapshot.length:
        raise ValueError(f"a snapshot at {snapshot.length} is not one of {identity}")
    tensors = {"recurrent": snapshot.recurrent, "convolution": snapshot.convolution}
    return _encode("kda", identity, tensors, codec)


def decode_latents(data: ReadableBuffer, expected: SegmentIdentity, layout: StateLayout) -> Tensor:
    """Decode the latents of the tokens [expected.start, expected.stop).

    Args:
        data: a whole segment; it is not referred to by the result.
        expected: the identity it must have.
        layout: the layout it must have.

    Returns:
        `[mla_layers, stop - start, latent_dim]` of the layout's latent dtype, on the CPU,
        contiguous and writable.

    Raises:
        SegmentError: the subclass names the first check that failed, in the order of FORMAT.md.
    """
    shape = layout.latents_shape(expected.stop - expected.start)
    (latents,) = _decode(
        data, "mla", expected, [_TensorSpec("latents", layout.latent_dtype, shape)]
    )
    return latents


def decode_snapshot(
    data: ReadableBuffer, expected: SegmentIdentity, layout: StateLayout
) -> KdaSnapshot:
    """Decode the state of all KDA layers after expected.stop tokens.

    Args:
        data: a whole segment; it is not referred to by the result.
        expected: the identity it must have; start and stop are both the snapshot's length.
        layout: the layout it must have.

    Returns:
        A snapshot with tensors of the layout's shapes and dtypes, on the CPU, contiguous and
        writable.

    Raises:
        SegmentError: the subclass names the first check that failed, in the order of FORMAT.md.
    """
    specs = [
        _TensorSpec("recurrent", layout.recurrent_dtype, layout.recurrent_shape),
        _TensorSpec("convolution", layout.convolution_dtype, layout.convolution_shape),
    ]
    recurrent, convolution = _decode(data, "kda", expected, specs)
    return KdaSnapshot(expected.stop, recurrent, convolution)


# --- what the format holds -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TensorSpec:
    """A tensor that a layout demands."""

    name: str
    dtype: StateDType
    shape: tuple[int, ...]

    @property
    def raw_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class _Header:
    kind: SegmentKind
    codec: Codec
    metadata_bytes: int
    payload_bytes: int
    checksum: bytes


_Size = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _TensorEntry(_Strict):
    name: Annotated[str, Field(max_length=64)]
    dtype: Annotated[str, Field(max_length=64)]
    shape: Annotated[tuple[_Size, ...], Field(max_length=8)]
    wire_bytes: _Size


class _Metadata(_Strict):
    fingerprint: Identifier
    request_id: Identifier
    epoch: Epoch
    start: _Size
    stop: _Size
    prefix_hash: Annotated[bytes, Field(min_length=16, max_length=16)]
    raw_bytes: _Size
    tensors: tuple[_TensorEntry, ...]


# --- writing ---------------------------------------------------------------------------------


def _encode(
    kind: SegmentKind, identity: SegmentIdentity, tensors: dict[str, Tensor], codec: Codec
) -> EncodedSegment:
    raw_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if raw_bytes > MAX_RAW_BYTES:
        raise SegmentTooLargeError(f"{raw_bytes} bytes of state are over {MAX_RAW_BYTES}")
    payloads = [codec.encode(_elements(tensor), tensor.itemsize) for tensor in tensors.values()]
    entries = tuple(
        _TensorEntry(
            name=name,
            dtype=_dtype_name(tensor),
            shape=tuple(tensor.shape),
            wire_bytes=len(payload),
        )
        for (name, tensor), payload in zip(tensors.items(), payloads, strict=True)
    )
    metadata = _Metadata(**asdict(identity), raw_bytes=raw_bytes, tensors=entries)
    return _seal(kind, codec, msgpack.packb(metadata.model_dump()), payloads, raw_bytes)


def _seal(
    kind: SegmentKind,
    codec: Codec,
    metadata: bytes,
    payloads: Sequence[ReadableBuffer],
    raw_bytes: int,
) -> EncodedSegment:
    payload_bytes = sum(len(payload) for payload in payloads)
    preamble = _PREAMBLE.pack(
        MAGIC, FORMAT_VERSION, _KIND_IDS[kind], codec.wire_id, len(metadata), payload_bytes
    )
    checksum = _checksum(preamble, metadata, *payloads)
    data = b"".join((preamble, checksum, metadata, *payloads))
    return EncodedSegment(data, kind, raw_bytes, checksum)


def _elements(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's elements in row-major order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _dtype_name(tensor: Tensor) -> StateDType:
    for name, dtype in TORCH_DTYPES.items():
        if tensor.dtype == dtype:
            return name
    raise ValueError(f"a state has no tensors of {tensor.dtype}")


def _checksum(*parts: ReadableBuffer) -> bytes:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest()


def checksum_of(data: ReadableBuffer) -> bytes:
    """The checksum a segment carries, not verified: whether it is the announced one.

    Raises:
        SegmentError: the header is damaged.
    """
    return _read_header(memoryview(data).cast("B")).checksum


# --- reading ---------------------------------------------------------------------------------


def _decode(
    data: ReadableBuffer, kind: SegmentKind, expected: SegmentIdentity, specs: list[_TensorSpec]
) -> list[Tensor]:
    segment = memoryview(data).cast("B")
    header = _read_header(segment)
    payload_start = _HEADER_BYTES + header.metadata_bytes
    if _checksum(segment[: _PREAMBLE.size], segment[_HEADER_BYTES:]) != header.checksum:
        raise SegmentChecksumError("segment does not match its checksum")
    metadata = _read_metadata(header, segment[_HEADER_BYTES:payload_start])
    _check_identity(header.kind, metadata, kind, expected)
    _check_tensors(metadata, specs)
    return list(_decode_tensors(header.codec, metadata, specs, segment[payload_start:]))


def _read_header(segment: memoryview) -> _Header:
    """Check what can be known of a segment without reading beyond its header."""
    if len(segment) < _HEADER_BYTES:
        raise SegmentTruncatedError(f"segment of {len(segment)} bytes has no whole header")
    magic, version, kind_id, codec_id, metadata_bytes, payload_bytes = _PREAMBLE.unpack_from(
        segment
    )
    if magic != MAGIC:
        raise SegmentMagicError(f"segment starts with {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise SegmentVersionError(f"segment has format version {version}, not {FORMAT_VERSION}")
    kind = _kind_with_id(kind_id)
    codec = codec_with_wire_id(codec_id)
    if metadata_bytes > MAX_METADATA_BYTES:
        raise SegmentTooLargeError(f"{metadata_bytes} bytes of metadata > {MAX_METADATA_BYTES}")
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise SegmentTooLargeError(f"{payload_bytes} bytes of payload > {MAX_PAYLOAD_BYTES}")
    announced = _HEADER_BYTES + metadata_bytes + payload_bytes
    if len(segment) != announced:
        raise SegmentTruncatedError(f"segment has {len(segment)} bytes, not {announced}")
    checksum = bytes(segment[_PREAMBLE.size : _HEADER_BYTES])
    return _Header(kind, codec, metadata_bytes, payload_bytes, checksum)


def _kind_with_id(kind_id: int) -> SegmentKind:
    for kind, known_id in _KIND_IDS.items():
        if kind_id == known_id:
            return kind
    raise SegmentVersionError(f"segment has kind {kind_id}, which this reader does not know")


def _read_metadata(header: _Header, packed: memoryview) -> _Metadata:
    try:
        unpacked = msgpack.unpackb(packed, use_list=False, object_pairs_hook=_unique_fields)
        metadata = _Metadata.model_validate(unpacked)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SegmentMetadataError(f"metadata: {where:.100}: {first['msg']}") from None
    except (ValueError, msgpack.UnpackException) as error:
        raise SegmentMetadataError(f"metadata is not msgpack: {error}") from None
    start, stop = metadata.start, metadata.stop
    if start > stop or (header.kind == "kda" and start != stop):
        raise SegmentMetadataError(f"tokens [{start}, {stop}) are no range of a {header.kind}")
    wire_bytes = sum(entry.wire_bytes for entry in metadata.tensors)
    if wire_bytes != header.payload_bytes:
        raise SegmentMetadataError(f"{wire_bytes} bytes of tensors in {header.payload_bytes}")
    if metadata.raw_bytes > MAX_RAW_BYTES:
        raise SegmentTooLargeError(f"{metadata.raw_bytes} bytes of state > {MAX_RAW_BYTES}")
    return metadata


def _unique_fields(pairs: Iterable[tuple[object, object]]) -> dict[object, object]:
    """Refuse a repeated key, of which two readers might take different values."""
    unique: dict[object, object] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError("a key is repeated")
        unique[key] = value
    return unique


def _check_identity(
    kind: SegmentKind, metadata: _Metadata, expected_kind: SegmentKind, expected: SegmentIdentity
) -> None:
    if kind != expected_kind:
        raise SegmentForeignError(f"segment is of kind {kind}, not {expected_kind}")
    for field in fields(expected):
        found, wanted = getattr(metadata, field.name), getattr(expected, field.name)
        if found != wanted:
            raise SegmentForeignError(f"segment has {field.name} {found!r}, not {wanted!r}")


def _check_tensors(metadata: _Metadata, specs: list[_TensorSpec]) -> None:
    found = [(entry.name, entry.dtype, entry.shape) for entry in metadata.tensors]
    wanted = [(spec.name, spec.dtype, spec.shape) for spec in specs]
    if found != wanted:
        raise SegmentShapeError(f"segment has tensors {found!r:.500}, not {wanted!r}")
    raw_bytes = sum(spec.raw_bytes for spec in specs)
    if metadata.raw_bytes != raw_bytes:
        raise SegmentShapeError(f"segment has {metadata.raw_bytes} bytes of state, not {raw_bytes}")


def _decode_tensors(
    codec: Codec, metadata: _Metadata, specs: list[_TensorSpec], payload: memoryview
) -> Iterable[Tensor]:
    offset = 0
    for entry, spec in zip(metadata.tensors, specs, strict=True):
        encoded = payload[offset : offset + entry.wire_bytes]
        element_bytes = DTYPE_BYTES[spec.dtype]
        elements = codec.decode(encoded, spec.raw_bytes, element_bytes).view(f"i{element_bytes}")
        yield torch.from_numpy(elements).view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        offset += entry.wire_bytes
