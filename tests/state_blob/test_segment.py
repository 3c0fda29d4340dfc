import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import SegmentTooLargeError
from shared.kernels.dtypes import StateDType
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.state_blob import segment
from shared.state_blob.codecs import CODECS, Codec, RawCodec, ReadableBuffer
from shared.state_blob.segment import (
    SegmentIdentity,
    decode_latents,
    decode_snapshot,
    encode_latents,
    encode_snapshot,
)

GOLDEN = Path(__file__).parent / "golden"
LAYOUT = StateLayout(
    kda_layers=2,
    kda_heads=3,
    kda_head_dim=4,
    convolution_taps=3,
    mla_layers=2,
    latent_dim=5,
    latent_dtype="bfloat16",
    convolution_dtype="bfloat16",
)
LATENTS_IDENTITY = SegmentIdentity("model-1", "request-1", 2, 64, 75, bytes(range(16)))
SNAPSHOT_IDENTITY = replace(LATENTS_IDENTITY, start=75)

TORCH_DTYPES: dict[StateDType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}

every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
dtypes = st.sampled_from(["float32", "bfloat16"])


def any_bits(shape: tuple[int, ...], dtype: StateDType, seed: int = 0) -> Tensor:
    """Draw elements of any bits, among them infinities, denormals and every kind of NaN."""
    bits = BITS[TORCH_DTYPES[dtype]]
    limits = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(limits.min, limits.max, shape, dtype=bits, generator=generator)
    return drawn.view(TORCH_DTYPES[dtype])


def steps(shape: tuple[int, ...], dtype: StateDType) -> Tensor:
    """Count up in eighths from a negative number."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) - count // 3) / 8).reshape(shape).to(TORCH_DTYPES[dtype])


def same_bits(left: Tensor, right: Tensor) -> bool:
    bits = BITS[left.dtype]
    return left.dtype == right.dtype and torch.equal(left.view(bits), right.view(bits))


def snapshot_of(
    draw: Callable[[tuple[int, ...], StateDType], Tensor], layout: StateLayout
) -> KdaSnapshot:
    return KdaSnapshot(
        SNAPSHOT_IDENTITY.stop,
        draw(layout.recurrent_shape, layout.recurrent_dtype),
        draw(layout.convolution_shape, layout.convolution_dtype),
    )


@every_codec
@given(
    mla_layers=st.integers(0, 3),
    tokens=st.integers(0, 70),
    latent_dim=st.integers(0, 9),
    dtype=dtypes,
    seed=st.integers(0, 1000),
)
def test_latents_come_back_bit_by_bit(
    *, codec: Codec, mla_layers: int, tokens: int, latent_dim: int, dtype: StateDType, seed: int
) -> None:
    layout = replace(LAYOUT, mla_layers=mla_layers, latent_dim=latent_dim, latent_dtype=dtype)
    identity = replace(LATENTS_IDENTITY, stop=LATENTS_IDENTITY.start + tokens)
    latents = any_bits(layout.latents_shape(tokens), dtype, seed)
    encoded = encode_latents(identity, latents, codec)
    assert same_bits(decode_latents(encoded.data, identity, layout), latents)
    assert encoded.raw_bytes == latents.nbytes


@every_codec
@given(
    kda_layers=st.integers(0, 3),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    taps=st.integers(0, 4),
    recurrent_dtype=dtypes,
    convolution_dtype=dtypes,
)
def test_snapshots_come_back_bit_by_bit(
    *,
    codec: Codec,
    kda_layers: int,
    heads: int,
    head_dim: int,
    taps: int,
    recurrent_dtype: StateDType,
    convolution_dtype: StateDType,
) -> None:
    layout = replace(
        LAYOUT,
        kda_layers=kda_layers,
        kda_heads=heads,
        kda_head_dim=head_dim,
        convolution_taps=taps,
        recurrent_dtype=recurrent_dtype,
        convolution_dtype=convolution_dtype,
    )
    snapshot = snapshot_of(any_bits, layout)
    encoded = encode_snapshot(SNAPSHOT_IDENTITY, snapshot, codec)
    decoded = decode_snapshot(encoded.data, SNAPSHOT_IDENTITY, layout)
    assert decoded.length == snapshot.length
    assert same_bits(decoded.recurrent, snapshot.recurrent)
    assert same_bits(decoded.convolution, snapshot.convolution)
    assert encoded.raw_bytes == snapshot.recurrent.nbytes + snapshot.convolution.nbytes


@every_codec
def test_tensors_with_any_strides_are_encoded_in_row_major_order(codec: Codec) -> None:
    buffer = any_bits((5, 100, 2), "bfloat16")
    for latents in (
        buffer.permute(2, 1, 0)[:, 64:75],
        buffer[:2, 64:75].repeat(1, 1, 3)[:, :, ::1][:, :, 1:6],
        buffer[:1, 3:14, :1].expand(2, 11, 5),
    ):
        assert not latents.is_contiguous()
        encoded = encode_latents(LATENTS_IDENTITY, latents, codec)
        decoded = decode_latents(encoded.data, LATENTS_IDENTITY, LAYOUT)
        assert same_bits(decoded, latents.contiguous())


@every_codec
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_decoded_tensors_are_writable_and_do_not_refer_to_the_segment(
    codec: Codec, wrap: Callable[[bytes | bytearray], ReadableBuffer]
) -> None:
    latents = steps((2, 11, 5), "bfloat16")
    data = bytearray(encode_latents(LATENTS_IDENTITY, latents, codec).data)
    decoded = decode_latents(wrap(data), LATENTS_IDENTITY, LAYOUT)
    data[:] = bytes(len(data))
    assert same_bits(decoded, latents)
    assert decoded.add_(1).is_contiguous()


def test_an_encoded_segment_says_what_its_bytes_say() -> None:
    encoded = encode_latents(LATENTS_IDENTITY, steps((2, 11, 5), "bfloat16"))
    assert encoded.kind == "mla"
    assert encoded.checksum == encoded.data[20:36]
    assert encode_snapshot(SNAPSHOT_IDENTITY, snapshot_of(steps, LAYOUT)).kind == "kda"


def test_latents_that_take_part_in_autograd_are_encoded() -> None:
    latents = steps((2, 11, 5), "bfloat16").requires_grad_()
    encoded = encode_latents(LATENTS_IDENTITY, latents)
    assert not decode_latents(encoded.data, LATENTS_IDENTITY, LAYOUT).requires_grad


@every_codec
def test_segments_are_encoded_and_decoded_in_many_threads(codec: Codec) -> None:
    layout = replace(LAYOUT, mla_layers=3, latent_dim=64)

    def round_trip(seed: int) -> bool:
        latents = any_bits(layout.latents_shape(11), "bfloat16", seed)
        data = encode_latents(LATENTS_IDENTITY, latents, codec).data
        return same_bits(decode_latents(data, LATENTS_IDENTITY, layout), latents)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(64)))


# --- what a writer refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": ""},
        {"fingerprint": "not an identifier"},
        {"request_id": "r" * 65},
        {"epoch": 0},
        {"start": -1, "stop": 10},
        {"prefix_hash": b"short"},
    ],
    ids=str,
)
def test_an_identity_that_no_reader_could_accept_is_not_written(change: dict[str, object]) -> None:
    identity = replace(LATENTS_IDENTITY, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(iter(change))):
        encode_latents(identity, steps((2, 11, 5), "bfloat16"))


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(2, 10, 5),
        torch.zeros(11, 5),
        torch.zeros(2, 11, 5, dtype=torch.float16),
        torch.zeros(2, 11, 5, dtype=torch.int32),
    ],
    ids=lambda latents: f"{list(latents.shape)} {latents.dtype}",
)
def test_latents_that_do_not_fit_the_format_are_not_written(latents: Tensor) -> None:
    with pytest.raises(ValueError, match=r"latents|tensors"):
        encode_latents(LATENTS_IDENTITY, latents)


def test_a_snapshot_of_another_length_is_not_written() -> None:
    snapshot = snapshot_of(steps, LAYOUT)
    for identity in (LATENTS_IDENTITY, replace(SNAPSHOT_IDENTITY, start=64, stop=64)):
        with pytest.raises(ValueError, match="snapshot at 75"):
            encode_snapshot(identity, snapshot)


def test_a_state_over_the_limit_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = steps((2, 11, 5), "bfloat16")
    monkeypatch.setattr(segment, "MAX_RAW_BYTES", latents.nbytes)
    encode_latents(LATENTS_IDENTITY, latents)
    monkeypatch.setattr(segment, "MAX_RAW_BYTES", latents.nbytes - 1)
    with pytest.raises(SegmentTooLargeError):
        encode_latents(LATENTS_IDENTITY, latents)


# --- the bytes of format version 1 -----------------------------------------------------------


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.segment").read_bytes()


@every_codec
def test_committed_latents_decode_bit_by_bit(codec: Codec) -> None:
    decoded = decode_latents(golden(f"latents_{codec.name}"), LATENTS_IDENTITY, LAYOUT)
    assert same_bits(decoded, steps((2, 11, 5), "bfloat16"))


@every_codec
def test_a_committed_snapshot_decodes_bit_by_bit(codec: Codec) -> None:
    decoded = decode_snapshot(golden(f"snapshot_{codec.name}"), SNAPSHOT_IDENTITY, LAYOUT)
    expected = snapshot_of(steps, LAYOUT)
    assert decoded.length == 75
    assert same_bits(decoded.recurrent, expected.recurrent)
    assert same_bits(decoded.convolution, expected.convolution)


def test_the_writer_still_writes_the_committed_bytes() -> None:
    """Only those of the raw codec: compressed bytes may differ between releases of zstd."""
    latents = encode_latents(LATENTS_IDENTITY, steps((2, 11, 5), "bfloat16"), RawCodec())
    snapshot = encode_snapshot(SNAPSHOT_IDENTITY, snapshot_of(steps, LAYOUT), RawCodec())
    assert latents.data == golden("latents_raw")
    assert snapshot.data == golden("snapshot_raw")


def test_a_reader_made_from_the_written_format_reads_a_segment() -> None:
    data = golden("snapshot_zstd")
    header = struct.unpack_from("<4sHBBIQ16s", data)
    magic, version, kind, codec, metadata_bytes, payload_bytes, checksum = header
    assert (magic, version, kind, codec) == (b"PRFS", 1, 2, 1)
    assert len(data) == 36 + metadata_bytes + payload_bytes
    assert checksum == xxhash.xxh3_128_digest(data[:20] + data[36:])

    metadata = msgpack.unpackb(data[36 : 36 + metadata_bytes])
    assert metadata == {
        "fingerprint": "model-1",
        "request_id": "request-1",
        "epoch": 2,
        "start": 75,
        "stop": 75,
        "prefix_hash": bytes(range(16)),
        "raw_bytes": 384 + 432,
        "tensors": [
            {"name": "recurrent", "dtype": "float32", "shape": [2, 3, 4, 4], "wire_bytes": 133},
            {"name": "convolution", "dtype": "bfloat16", "shape": [2, 36, 3], "wire_bytes": 255},
        ],
    }

    recurrent = zstandard.ZstdDecompressor().decompress(data[36 + metadata_bytes :][:133])
    elements = np.frombuffer(recurrent, np.uint8).reshape(4, -1).T.tobytes()
    assert np.array_equal(np.frombuffer(elements, "<f4"), (np.arange(96) - 32) / 8)
