"""State segments: the tensors of one piece of a request's state as self-describing, verified bytes.

The byte format is written down in FORMAT.md beside this file. A reader says what it expects, and
takes nothing else: it refuses with the `SegmentError` that names the first check that failed, and
checks everything that can be checked before it allocates memory for the tensors.
"""

from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Final

import torch
from torch import Tensor

from shared.errors import SegmentShapeError, SegmentTooLargeError
from shared.kernels.torch_dtypes import TORCH_DTYPES
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.state_blob.codecs import DEFAULT_CODEC, Codec
from shared.state_blob.coding import ALIGNMENT, ByteArray, Coding, ReadableBuffer
from shared.state_blob.header import (
    ELEMENT_BYTES,
    HEADER_BYTES,
    MAX_RAW_BYTES,
    PAYLOAD_ALIGNMENT,
    ElementDType,
    Header,
    Metadata,
    SegmentIdentity,
    TensorEntry,
    check_identity,
    checksum_of,
    encoded_tensors,
    pack_header,
    pack_metadata,
    padded,
    read_identity,
    read_metadata,
    read_whole_header,
)
from shared.state_blob.kinds import SegmentKind
from shared.state_blob.rounding import ROUNDINGS, TensorSpec
from shared.state_blob.seal import check_seal, seal

__all__ = [
    "EncodedSegment",
    "SegmentIdentity",
    "checksum_of",
    "decode_latents",
    "decode_snapshot",
    "encode_latents",
    "encode_snapshot",
    "read_identity",
]

_ELEMENT_DTYPES: Final[dict[ElementDType, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_STATE_DTYPES: Final[tuple[ElementDType, ...]] = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """A segment as it is stored, with what a manifest says of it."""

    data: bytes
    kind: SegmentKind
    raw_bytes: int
    """Bytes of the state's tensors before encoding."""
    checksum: bytes
    """xxh3_128 of everything in `data` but itself and the MAC, 16 bytes."""


def encode_latents(
    identity: SegmentIdentity,
    latents: Tensor,
    codec: Codec = DEFAULT_CODEC,
    key: bytes | None = None,
) -> EncodedSegment:
    """Encode the latents of all MLA layers for the tokens [identity.start, identity.stop).

    Args:
        identity: whose latents these are.
        latents: `[mla_layers, stop - start, latent_dim]`, fp32 or bf16, on any device, with any
            strides.
        codec: how the payload is encoded.
        key: signs the segment, at least 16 bytes; None leaves it unsigned.

    Returns:
        A segment of kind `mla`.

    Raises:
        ValueError: identity, latents, codec or key are not as described, or the codec cannot hold
            what the latents are.
        SegmentTooLargeError: the latents are larger than `MAX_RAW_BYTES`.
    """
    tokens = identity.stop - identity.start
    if latents.ndim != 3 or latents.shape[1] != tokens:
        raise ValueError(f"latents {list(latents.shape)} do not cover {tokens} tokens")
    if len(latents) != identity.layers:
        raise ValueError(
            f"latents of {len(latents)} layers are not of the {identity.layers} layers"
        )
    return _encode("mla", identity, {"latents": latents}, codec, key)


def encode_snapshot(
    identity: SegmentIdentity,
    snapshot: KdaSnapshot,
    codec: Codec = DEFAULT_CODEC,
    key: bytes | None = None,
) -> EncodedSegment:
    """Encode the state of some KDA layers after identity.stop tokens.

    Args:
        identity: whose snapshot this is, and which layers'; start and stop are both its length.
        snapshot: its tensors fp32 or bf16, on any device, with any strides.
        codec: how the payload is encoded.
        key: signs the segment, at least 16 bytes; None leaves it unsigned.

    Returns:
        A segment of kind `kda`.

    Raises:
        ValueError: identity, snapshot, codec or key are not as described.
        SegmentTooLargeError: the snapshot is larger than `MAX_RAW_BYTES`.
    """
    if not identity.start == identity.stop == snapshot.length:
        raise ValueError(f"a snapshot at {snapshot.length} is not one of {identity}")
    if (identity.first_layer, identity.layers) != (snapshot.first_layer, snapshot.layers):
        raise ValueError(
            f"a snapshot of {snapshot.layers} layers from {snapshot.first_layer} on is not one of "
            f"{identity.layers} layers from {identity.first_layer} on"
        )
    tensors = {"recurrent": snapshot.recurrent, "convolution": snapshot.convolution}
    return _encode("kda", identity, tensors, codec, key)


def decode_latents(
    data: ReadableBuffer,
    expected: SegmentIdentity,
    layout: StateLayout,
    key: bytes | None = None,
) -> Tensor:
    """Decode the latents of the tokens [expected.start, expected.stop).

    Args:
        data: a whole segment; the result may be a view of it where it is writable, so nobody may
            write to it afterwards.
        expected: the identity it must have.
        layout: the layout that is wanted; dtypes are converted to its own.
        key: that it must be signed with; None takes signed and unsigned ones.

    Returns:
        `[mla_layers, stop - start, latent_dim]` of the layout's latent dtype, on the CPU,
        contiguous and writable.

    Raises:
        SegmentError: the subclass names the first check that failed, in the order of FORMAT.md.
        ValueError: the key is too short.
    """
    shape = layout.latents_shape(expected.stop - expected.start)
    specs = [TensorSpec("latents", _STATE_DTYPES, shape)]
    latents = _decode(data, "mla", expected, specs, key)["latents"]
    return latents.to(TORCH_DTYPES[layout.latent_dtype])


def decode_snapshot(
    data: ReadableBuffer,
    expected: SegmentIdentity,
    layout: StateLayout,
    key: bytes | None = None,
) -> KdaSnapshot:
    """Decode the state of some KDA layers after expected.stop tokens.

    Args:
        data: a whole segment; the result may be a view of it where it is writable, so nobody may
            write to it afterwards.
        expected: the identity it must have, which names the layers; start and stop are both the
            snapshot's length.
        layout: the layout that is wanted; dtypes are converted to its own.
        key: that it must be signed with; None takes signed and unsigned ones.

    Returns:
        A snapshot of these layers, with tensors of the layout's shapes and dtypes, on the CPU,
        contiguous and writable.

    Raises:
        SegmentError: the subclass names the first check that failed, in the order of FORMAT.md.
        ValueError: the key is too short.
    """
    layers = range(layout.kda_layers)[expected.first_layer :][: expected.layers]
    specs = [
        TensorSpec("recurrent", _STATE_DTYPES, (len(layers), *layout.recurrent_shape[1:])),
        TensorSpec("convolution", _STATE_DTYPES, (len(layers), *layout.convolution_shape[1:])),
    ]
    tensors = _decode(data, "kda", expected, specs, key)
    return KdaSnapshot(
        expected.stop,
        tensors["recurrent"].to(TORCH_DTYPES[layout.recurrent_dtype]),
        tensors["convolution"].to(TORCH_DTYPES[layout.convolution_dtype]),
        expected.first_layer,
    )


# --- writing ---------------------------------------------------------------------------------


def _encode(
    kind: SegmentKind,
    identity: SegmentIdentity,
    tensors: dict[str, Tensor],
    codec: Codec,
    key: bytes | None,
) -> EncodedSegment:
    if kind not in codec.kinds:
        raise ValueError(f"codec {codec.name} is not one for segments of kind {kind}")
    for name, tensor in tensors.items():
        if _dtype_name(tensor) not in _STATE_DTYPES:
            raise ValueError(f"a state has no tensors of {tensor.dtype}, as {name} is")
    raw_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if raw_bytes > MAX_RAW_BYTES:
        raise SegmentTooLargeError(f"{raw_bytes} bytes of state are over {MAX_RAW_BYTES}")
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    stored = ROUNDINGS[codec.rounding].store(on_cpu)
    payloads = {
        name: codec.coding.encode(_elements(tensor), tensor.itemsize)
        for name, tensor in stored.items()
    }
    entries = tuple(
        TensorEntry(
            name=name,
            dtype=_dtype_name(tensor),
            shape=tuple(tensor.shape),
            wire_bytes=len(payloads[name]),
        )
        for name, tensor in stored.items()
    )
    metadata = pack_metadata(kind, identity, raw_bytes, entries)
    return _assemble(kind, codec, metadata, list(payloads.values()), raw_bytes, key)


def _assemble(
    kind: SegmentKind,
    codec: Codec,
    metadata: bytes,
    encoded: list[ReadableBuffer],
    raw_bytes: int,
    key: bytes | None,
) -> EncodedSegment:
    between = [padded(len(part), ALIGNMENT) for part in encoded[:-1]]
    payload = list(chain.from_iterable(zip(encoded, [*between, b""], strict=True)))
    header = Header(
        kind=kind,
        codec=codec,
        signed=key is not None,
        metadata_bytes=len(metadata),
        payload_bytes=sum(map(len, payload)),
    )
    preamble = pack_header(header)
    content = [metadata, padded(HEADER_BYTES + len(metadata), PAYLOAD_ALIGNMENT), *payload]
    sealed = seal(preamble, content, key)
    data = b"".join((preamble, sealed.checksum, sealed.mac, *content))
    return EncodedSegment(data, kind, raw_bytes, sealed.checksum)


def _elements(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's elements in row-major order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _dtype_name(tensor: Tensor) -> ElementDType:
    for name, dtype in _ELEMENT_DTYPES.items():
        if tensor.dtype == dtype:
            return name
    raise ValueError(f"a segment has no tensors of {tensor.dtype}")


# --- reading ---------------------------------------------------------------------------------


def _decode(
    data: ReadableBuffer,
    kind: SegmentKind,
    expected: SegmentIdentity,
    specs: list[TensorSpec],
    key: bytes | None,
) -> dict[str, Tensor]:
    segment = memoryview(data).cast("B")
    header = read_whole_header(segment)
    check_seal(header, segment, key)
    metadata = read_metadata(header, segment)
    check_identity(header, metadata, kind, expected)
    rounding = ROUNDINGS[header.codec.rounding]
    _check_tensors(header.codec, metadata, expected, rounding.stored(specs))
    encoded = encoded_tensors(metadata, segment[header.payload_start :])
    return rounding.restore(
        {
            entry.name: _decode_tensor(header.codec.coding, entry, part)
            for entry, part in zip(metadata.tensors, encoded, strict=True)
        }
    )


def _check_tensors(
    codec: Codec, metadata: Metadata, expected: SegmentIdentity, specs: list[TensorSpec]
) -> None:
    found = [(entry.name, entry.shape) for entry in metadata.tensors]
    wanted = [(spec.name, spec.shape) for spec in specs]
    if found != wanted or any(shape[0] != expected.layers for _, shape in wanted):
        raise SegmentShapeError(
            f"segment has tensors {found!r:.500} of {expected.layers} layers, not {wanted!r}"
        )
    for entry, spec in zip(metadata.tensors, specs, strict=True):
        if entry.dtype not in spec.dtypes:
            raise SegmentShapeError(f"segment has {entry.name} of {entry.dtype}, not {spec.dtypes}")
    raw_bytes = sum(map(_stored_bytes, metadata.tensors))
    if codec.lossless and metadata.raw_bytes != raw_bytes:
        raise SegmentShapeError(f"segment has {metadata.raw_bytes} bytes of state, not {raw_bytes}")


def _element_dtype(entry: TensorEntry) -> ElementDType:
    """The dtype of an entry that was checked to have one."""
    return next(dtype for dtype in ELEMENT_BYTES if dtype == entry.dtype)


def _stored_bytes(entry: TensorEntry) -> int:
    return prod(entry.shape) * ELEMENT_BYTES[_element_dtype(entry)]


def _decode_tensor(coding: Coding, entry: TensorEntry, encoded: memoryview) -> Tensor:
    element_bytes = ELEMENT_BYTES[_element_dtype(entry)]
    elements: ByteArray = coding.decode(encoded, _stored_bytes(entry), element_bytes)
    numbers = torch.from_numpy(elements.view(f"i{element_bytes}"))
    return numbers.view(_ELEMENT_DTYPES[_element_dtype(entry)]).view(entry.shape)
