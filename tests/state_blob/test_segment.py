import hmac
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import msgpack
import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import SegmentShapeError, SegmentSignatureError, SegmentTooLargeError
from shared.kernels.dtypes import StateDType
from shared.kernels.torch_dtypes import TORCH_DTYPES
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.state_blob import segment
from shared.state_blob.codecs import (
    BF16_STATE,
    CODECS,
    INT8_LATENT,
    RAW,
    ZSTD,
    Codec,
    codec_named,
    codecs_for,
)
from shared.state_blob.coding import ReadableBuffer
from shared.state_blob.segment import (
    checksum_of,
    decode_latents,
    decode_snapshot,
    encode_latents,
    encode_snapshot,
)
from tests.state_blob.independent_writer import GOLDEN, golden_files
from tests.state_blob.states import (
    KEY,
    LATENTS,
    LATENTS_IDENTITY,
    LAYOUT,
    SNAPSHOT,
    SNAPSHOT_IDENTITY,
    any_bits,
    same_bits,
)

lossless_codecs = [codec for codec in CODECS if codec.lossless]
every_lossless_codec = pytest.mark.parametrize(
    "codec", lossless_codecs, ids=lambda codec: codec.name
)
dtypes = st.sampled_from(["float32", "bfloat16"])


def snapshot_of(layout: StateLayout, first_layer: int = 0, seed: int = 0) -> KdaSnapshot:
    """Any bits, of all layers of a layout from `first_layer` on."""
    layers = layout.kda_layers - first_layer
    return KdaSnapshot(
        SNAPSHOT_IDENTITY.stop,
        any_bits((layers, *layout.recurrent_shape[1:]), layout.recurrent_dtype, seed),
        any_bits((layers, *layout.convolution_shape[1:]), layout.convolution_dtype, seed),
        first_layer,
    )


@every_lossless_codec
@given(
    mla_layers=st.integers(1, 3),
    tokens=st.integers(0, 70),
    latent_dim=st.integers(0, 9),
    dtype=dtypes,
    seed=st.integers(0, 1000),
    key=st.sampled_from([None, KEY]),
)
def test_latents_come_back_bit_by_bit(
    *,
    codec: Codec,
    mla_layers: int,
    tokens: int,
    latent_dim: int,
    dtype: StateDType,
    seed: int,
    key: bytes | None,
) -> None:
    layout = replace(LAYOUT, mla_layers=mla_layers, latent_dim=latent_dim, latent_dtype=dtype)
    identity = replace(
        LATENTS_IDENTITY,
        stop=LATENTS_IDENTITY.start + tokens,
        parent_hash=bytes(16),
        prefix_hash=bytes(16),
        layers=mla_layers,
    )
    latents = any_bits(layout.latents_shape(tokens), dtype, seed)
    encoded = encode_latents(identity, latents, codec, key)
    assert same_bits(decode_latents(encoded.data, identity, layout, key), latents)
    assert encoded.raw_bytes == latents.nbytes


@every_lossless_codec
@given(
    kda_layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    taps=st.integers(0, 4),
    recurrent_dtype=dtypes,
    convolution_dtype=dtypes,
    data=st.data(),
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
    data: st.DataObject,
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
    first_layer = data.draw(st.integers(0, kda_layers - 1))
    snapshot = snapshot_of(layout, first_layer)
    identity = replace(SNAPSHOT_IDENTITY, first_layer=first_layer, layers=snapshot.layers)
    encoded = encode_snapshot(identity, snapshot, codec)
    decoded = decode_snapshot(encoded.data, identity, layout)
    assert (decoded.length, decoded.first_layer) == (snapshot.length, first_layer)
    assert same_bits(decoded.recurrent, snapshot.recurrent)
    assert same_bits(decoded.convolution, snapshot.convolution)
    assert encoded.raw_bytes == snapshot.recurrent.nbytes + snapshot.convolution.nbytes


@every_lossless_codec
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


def test_an_encoded_segment_says_what_its_bytes_say() -> None:
    encoded = encode_latents(LATENTS_IDENTITY, LATENTS)
    assert encoded.kind == "mla"
    assert encoded.checksum == encoded.data[24:40] == checksum_of(encoded.data)
    assert encode_snapshot(SNAPSHOT_IDENTITY, SNAPSHOT).kind == "kda"


def test_latents_that_take_part_in_autograd_are_encoded() -> None:
    encoded = encode_latents(LATENTS_IDENTITY, LATENTS.clone().requires_grad_())
    assert not decode_latents(encoded.data, LATENTS_IDENTITY, LAYOUT).requires_grad


@every_lossless_codec
def test_segments_are_encoded_and_decoded_in_many_threads(codec: Codec) -> None:
    layout = replace(LAYOUT, mla_layers=3, latent_dim=64)
    identity = replace(LATENTS_IDENTITY, layers=3)

    def round_trip(seed: int) -> bool:
        latents = any_bits(layout.latents_shape(11), "bfloat16", seed)
        data = encode_latents(identity, latents, codec, KEY).data
        return same_bits(decode_latents(data, identity, layout, KEY), latents)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(64)))


# --- without copies --------------------------------------------------------------------------


@pytest.mark.parametrize("fingerprint", ["m" * length for length in range(1, 65)])
def test_a_raw_segment_is_read_where_it_was_received(fingerprint: str) -> None:
    """Fingerprints of all lengths, so that the metadata ends at each place of a line of 64."""
    identity = replace(SNAPSHOT_IDENTITY, fingerprint=fingerprint, layers=1)
    snapshot = KdaSnapshot(75, torch.ones(1, 1, 4, 4), torch.ones(1, 12, 3).bfloat16(), 1)
    data = bytearray(encode_snapshot(identity, snapshot, RAW).data)
    decoded = decode_snapshot(data, identity, LAYOUT)
    start = np.frombuffer(data, np.uint8).ctypes.data
    for tensor in (decoded.recurrent, decoded.convolution):
        assert start <= tensor.data_ptr() < start + len(data)
        assert tensor.data_ptr() % 8 == 0
        tensor.fill_(2)
    assert data[-2:] == bytearray(torch.full((1,), 2).bfloat16().view(torch.uint8).numpy().data)
    assert (decoded.recurrent.data_ptr() - start) % 64 == 0


def test_a_view_keeps_the_received_bytes_alive() -> None:
    def received() -> Tensor:
        data = bytearray(encode_latents(LATENTS_IDENTITY, LATENTS, RAW).data)
        return decode_latents(data, LATENTS_IDENTITY, LAYOUT)

    decoded = received()
    others = [bytearray(b"\xff" * 540) for _ in range(100)]
    assert same_bits(decoded, LATENTS), others


@pytest.mark.parametrize("codec", codecs_for("mla"), ids=lambda codec: codec.name)
@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_decoded_tensors_are_writable_and_leave_constant_bytes_alone(
    codec: Codec, wrap: Callable[[bytes], ReadableBuffer]
) -> None:
    data = encode_latents(LATENTS_IDENTITY, LATENTS, codec).data
    before = bytearray(data)
    decoded = decode_latents(wrap(data), LATENTS_IDENTITY, LAYOUT)
    assert decoded.fill_(1).is_contiguous()
    assert data == before


# --- dtypes of the reader's own --------------------------------------------------------------


@every_lossless_codec
@given(written=st.tuples(dtypes, dtypes), read=st.tuples(dtypes, dtypes))
def test_a_reader_gets_its_own_dtypes_whatever_was_written(
    *, codec: Codec, written: tuple[StateDType, StateDType], read: tuple[StateDType, StateDType]
) -> None:
    identity = replace(SNAPSHOT_IDENTITY, first_layer=0, layers=3)
    snapshot = snapshot_of(
        replace(LAYOUT, recurrent_dtype=written[0], convolution_dtype=written[1])
    )
    layout = replace(LAYOUT, recurrent_dtype=read[0], convolution_dtype=read[1])
    decoded = decode_snapshot(encode_snapshot(identity, snapshot, codec).data, identity, layout)
    for found, original, dtype in (
        (decoded.recurrent, snapshot.recurrent, read[0]),
        (decoded.convolution, snapshot.convolution, read[1]),
    ):
        assert same_bits(found, original.to(TORCH_DTYPES[dtype]))


@pytest.mark.parametrize("codec", codecs_for("mla"), ids=lambda codec: codec.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_converted_to_the_readers_dtype(codec: Codec, dtype: StateDType) -> None:
    layout = replace(LAYOUT, latent_dtype=dtype)
    data = encode_latents(LATENTS_IDENTITY, LATENTS, codec).data
    decoded = decode_latents(data, LATENTS_IDENTITY, layout)
    assert decoded.dtype == TORCH_DTYPES[dtype]
    torch.testing.assert_close(decoded.float(), LATENTS.float(), rtol=0.01, atol=0.05)


def test_layouts_that_differ_in_dtypes_alone_read_each_others_states() -> None:
    narrow = replace(LAYOUT, recurrent_dtype="bfloat16")
    assert narrow.signature == replace(LAYOUT, latent_dtype="float32").signature
    shapes = ["kda_layers", "kda_heads", "kda_head_dim", "convolution_taps", "mla_layers"]
    others = {replace(LAYOUT, **{name: 7}).signature for name in [*shapes, "latent_dim"]}  # type: ignore[arg-type]
    assert len(others | {LAYOUT.signature}) == len(shapes) + 2


# --- what is lost ----------------------------------------------------------------------------


def test_bf16_state_rounds_recurrent_states_to_nearest_even_and_nothing_else() -> None:
    ulp = 2.0**-7
    numbers = [1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 2**-20, -1 - ulp / 2, 3.4e38]
    expected = [1, 1 + 2 * ulp, 1 + ulp, -1, float("inf")]
    numbers += [float("inf"), -0.0, 1e-45]
    expected += [float("inf"), -0.0, 0.0]
    recurrent = torch.tensor([*numbers * 4]).reshape(2, 1, 4, 4)
    snapshot = replace(SNAPSHOT, recurrent=recurrent)
    data = encode_snapshot(SNAPSHOT_IDENTITY, snapshot, BF16_STATE).data
    decoded = decode_snapshot(data, SNAPSHOT_IDENTITY, LAYOUT)
    assert same_bits(decoded.recurrent.flatten()[:8], torch.tensor(expected))
    assert same_bits(decoded.convolution, snapshot.convolution)


def test_bf16_state_keeps_what_is_bf16_already_and_is_smaller_for_the_rest() -> None:
    numbers = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    layout = replace(LAYOUT, kda_head_dim=64)
    snapshot = KdaSnapshot(75, numbers, torch.zeros(2, 192, 3), 1)
    once = decode_snapshot(
        encode_snapshot(SNAPSHOT_IDENTITY, snapshot, BF16_STATE).data, SNAPSHOT_IDENTITY, layout
    )
    sizes = {
        codec.name: len(encode_snapshot(SNAPSHOT_IDENTITY, once, codec).data)
        for codec in codecs_for("kda")
    }
    twice = decode_snapshot(
        encode_snapshot(SNAPSHOT_IDENTITY, once, BF16_STATE).data, SNAPSHOT_IDENTITY, layout
    )
    assert same_bits(twice.recurrent, once.recurrent)
    assert sizes["bf16-state"] < sizes["zstd"] < sizes["raw"]


@given(
    tokens=st.integers(0, 40),
    exponent=st.integers(-140, 127),
    zeros=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 1000),
)
def test_int8_latents_are_off_by_half_a_step_at_most(
    tokens: int, exponent: int, zeros: set[int], seed: int
) -> None:
    identity = replace(
        LATENTS_IDENTITY, stop=64 + tokens, parent_hash=bytes(16), prefix_hash=bytes(16)
    )
    generator = torch.Generator().manual_seed(seed)
    latents = (torch.rand(2, tokens, 5, generator=generator) * 2 - 1) * 2.0**exponent
    latents[:, :, sorted(zeros)] = 0
    layout = replace(LAYOUT, latent_dtype="float32")
    encoded = encode_latents(identity, latents, INT8_LATENT)
    decoded = decode_latents(encoded.data, identity, layout)
    assert encoded.raw_bytes == latents.nbytes
    assert not decoded[:, :, sorted(zeros)].any()
    if tokens:
        step = latents.double().abs().amax(dim=1, keepdim=True) / 127
        # The last part: a scale is rounded to a float, whose steps are wide where it is tiny.
        bound = step * 0.5001 + 127 * 2.0**-148
        assert ((decoded - latents.double()).abs() <= bound).all()


def test_int8_latents_of_the_largest_and_smallest_numbers_stay_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    for value in (largest, largest / 3, -largest, 1e-45, 1e-40, -0.0):
        latents = torch.full((2, 11, 5), value)
        layout = replace(LAYOUT, latent_dtype="float32")
        data = encode_latents(LATENTS_IDENTITY, latents, INT8_LATENT).data
        decoded = decode_latents(data, LATENTS_IDENTITY, layout)
        torch.testing.assert_close(decoded, latents, rtol=1e-6, atol=1e-42)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_latents_that_are_not_finite_are_not_written_as_int8(value: float) -> None:
    latents = LATENTS.clone()
    latents[1, 5, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        encode_latents(LATENTS_IDENTITY, latents, INT8_LATENT)


# --- signatures ------------------------------------------------------------------------------


def test_a_signed_segment_is_read_with_its_key_and_by_readers_without_one() -> None:
    data = encode_latents(LATENTS_IDENTITY, LATENTS, key=KEY).data
    for key in (KEY, None):
        assert same_bits(decode_latents(data, LATENTS_IDENTITY, LAYOUT, key), LATENTS)


def test_a_reader_with_a_key_takes_nothing_that_was_not_signed_with_it() -> None:
    for key in (None, KEY[:-1], bytes(32)):
        data = encode_snapshot(SNAPSHOT_IDENTITY, SNAPSHOT, key=key).data
        with pytest.raises(SegmentSignatureError, match="not signed"):
            decode_snapshot(data, SNAPSHOT_IDENTITY, LAYOUT, KEY)


def test_a_short_key_is_refused_on_both_sides() -> None:
    data = encode_latents(LATENTS_IDENTITY, LATENTS, key=KEY).data
    with pytest.raises(ValueError, match="at least 16 bytes"):
        encode_latents(LATENTS_IDENTITY, LATENTS, key=bytes(15))
    with pytest.raises(ValueError, match="at least 16 bytes"):
        decode_latents(data, LATENTS_IDENTITY, LAYOUT, bytes(15))


# --- what a writer refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": ""},
        {"fingerprint": "not an identifier"},
        {"producer": "r" * 65},
        {"epoch": 0},
        {"start": -1, "stop": 10},
        {"prefix_hash": b"short"},
        {"parent_hash": bytes(17)},
        {"first_layer": 1},
    ],
    ids=str,
)
def test_an_identity_that_no_reader_could_accept_is_not_written(change: dict[str, object]) -> None:
    identity = replace(LATENTS_IDENTITY, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(iter(change))):
        encode_latents(identity, LATENTS)


def test_two_names_for_the_same_tokens_are_not_written() -> None:
    identity = replace(SNAPSHOT_IDENTITY, parent_hash=bytes(16))
    with pytest.raises(ValueError, match="parent_hash"):
        encode_snapshot(identity, SNAPSHOT)


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(2, 10, 5),
        torch.zeros(3, 11, 5),
        torch.zeros(11, 5),
        torch.zeros(2, 11, 5, dtype=torch.float16),
        torch.zeros(2, 11, 5, dtype=torch.int32),
        torch.zeros(2, 11, 5, dtype=torch.int8),
    ],
    ids=lambda latents: f"{list(latents.shape)} {latents.dtype}",
)
def test_latents_that_do_not_fit_the_format_are_not_written(latents: Tensor) -> None:
    with pytest.raises(ValueError, match=r"latents|tensors"):
        encode_latents(LATENTS_IDENTITY, latents)


def test_a_snapshot_of_another_length_or_of_other_layers_is_not_written() -> None:
    for change in ({"start": 64}, {"start": 64, "stop": 64}):
        with pytest.raises(ValueError, match="snapshot at 75"):
            encode_snapshot(replace(SNAPSHOT_IDENTITY, **change), SNAPSHOT)  # type: ignore[arg-type]
    for change in ({"first_layer": 0}, {"layers": 3}):
        with pytest.raises(ValueError, match="2 layers from 1 on"):
            encode_snapshot(replace(SNAPSHOT_IDENTITY, **change), SNAPSHOT)  # type: ignore[arg-type]


def test_a_codec_of_the_other_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16-state is not one for segments of kind mla"):
        encode_latents(LATENTS_IDENTITY, LATENTS, BF16_STATE)
    with pytest.raises(ValueError, match="int8-latent is not one for segments of kind kda"):
        encode_snapshot(SNAPSHOT_IDENTITY, SNAPSHOT, INT8_LATENT)


def test_a_state_over_the_limit_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "MAX_RAW_BYTES", LATENTS.nbytes)
    encode_latents(LATENTS_IDENTITY, LATENTS)
    monkeypatch.setattr(segment, "MAX_RAW_BYTES", LATENTS.nbytes - 1)
    with pytest.raises(SegmentTooLargeError):
        encode_latents(LATENTS_IDENTITY, LATENTS)


# --- pieces ----------------------------------------------------------------------------------


def test_a_snapshot_travels_in_pieces() -> None:
    snapshot = snapshot_of(LAYOUT)
    pieces = snapshot.split(1)
    assert len(pieces) == 3
    for piece in pieces:
        identity = replace(SNAPSHOT_IDENTITY, first_layer=piece.first_layer, layers=1)
        data = encode_snapshot(identity, piece).data
        decoded = decode_snapshot(data, identity, LAYOUT)
        layers = slice(piece.first_layer, piece.first_layer + 1)
        assert same_bits(decoded.recurrent, snapshot.recurrent[layers])


def test_layers_that_the_layout_does_not_have_are_refused() -> None:
    identity = replace(SNAPSHOT_IDENTITY, first_layer=2)
    data = encode_snapshot(identity, replace(SNAPSHOT, first_layer=2)).data
    with pytest.raises(SegmentShapeError):
        decode_snapshot(data, identity, LAYOUT)


# --- the bytes of format version 2 -----------------------------------------------------------


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.segment").read_bytes()


@pytest.mark.parametrize("name", ["raw", "zstd", "signed"])
def test_committed_latents_decode_bit_by_bit(name: str) -> None:
    key = KEY if name == "signed" else None
    decoded = decode_latents(golden(f"latents_{name}"), LATENTS_IDENTITY, LAYOUT, key)
    assert same_bits(decoded, LATENTS)


@pytest.mark.parametrize("name", ["raw", "zstd", "bf16-state"])
def test_a_committed_snapshot_decodes_bit_by_bit(name: str) -> None:
    """Also the rounded one: it holds numbers that bf16 has."""
    decoded = decode_snapshot(golden(f"snapshot_{name}"), SNAPSHOT_IDENTITY, LAYOUT)
    assert (decoded.length, decoded.first_layer, decoded.layers) == (75, 1, 2)
    assert same_bits(decoded.recurrent, SNAPSHOT.recurrent)
    assert same_bits(decoded.convolution, SNAPSHOT.convolution)


def test_committed_int8_latents_are_integers_times_the_scale_of_their_channel() -> None:
    layout = replace(LAYOUT, latent_dtype="float32")
    decoded = decode_latents(golden("latents_int8-latent"), LATENTS_IDENTITY, layout)
    numbers = torch.arange(-55.0, 55).reshape(2, 11, 5)
    scales = (torch.arange(10.0) / 4).reshape(2, 1, 5)
    assert torch.equal(decoded, numbers * scales)


def test_the_writer_still_writes_the_committed_bytes() -> None:
    """Only those that are not compressed: what zstd makes may differ between its releases."""
    latents, snapshot = (LATENTS_IDENTITY, LATENTS), (SNAPSHOT_IDENTITY, SNAPSHOT)
    assert encode_latents(*latents, RAW).data == golden("latents_raw")
    assert encode_latents(*latents, RAW, KEY).data == golden("latents_signed")
    assert encode_snapshot(*snapshot, RAW).data == golden("snapshot_raw")


def test_the_committed_bytes_are_what_the_written_format_says() -> None:
    assert {name: golden(name) for name in golden_files()} == golden_files()


@pytest.mark.parametrize("key", [None, KEY])
def test_a_reader_made_from_the_written_format_reads_a_segment(key: bytes | None) -> None:
    data = encode_snapshot(SNAPSHOT_IDENTITY, SNAPSHOT, ZSTD, key).data
    header = struct.unpack_from("<4sHBBIIQ16s32s", data)
    magic, version, kind, codec, flags, metadata_bytes, payload_bytes, checksum, mac = header
    assert (magic, version, kind, codec, flags) == (b"PRFS", 2, 2, 1, int(key is not None))
    payload_start = -(-(72 + metadata_bytes) // 64) * 64
    assert len(data) == payload_start + payload_bytes
    assert checksum == xxhash.xxh3_128_digest(data[:24] + data[72:])
    if key is None:
        assert mac == bytes(32)
    else:
        assert mac == hmac.digest(key, data[:40] + data[72:], "sha256")

    metadata = msgpack.unpackb(data[72 : 72 + metadata_bytes])
    tensors = metadata.pop("tensors")
    assert metadata == asdict(SNAPSHOT_IDENTITY) | {"raw_bytes": 128 + 144}
    first, second = (tensor.pop("wire_bytes") for tensor in tensors)
    assert tensors == [
        {"name": "recurrent", "dtype": "float32", "shape": [2, 1, 4, 4]},
        {"name": "convolution", "dtype": "bfloat16", "shape": [2, 12, 3]},
    ]

    payload = data[payload_start:]
    assert len(payload) == -(-first // 8) * 8 + second
    recurrent = zstandard.ZstdDecompressor().decompress(payload[:first])
    elements = np.frombuffer(recurrent, np.uint8).reshape(4, -1).T.tobytes()
    assert np.array_equal(np.frombuffer(elements, "<f4"), (np.arange(32) - 10) / 8)


def test_codecs_are_named_in_the_header() -> None:
    for name in ("raw", "zstd"):
        data = encode_latents(LATENTS_IDENTITY, LATENTS, codec_named(name)).data
        assert data[7] == codec_named(name).wire_id
