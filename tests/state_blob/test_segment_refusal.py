"""Whatever a reader is given, it returns what it expects or raises the error that says why not."""

import random
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import (
    SegmentChecksumError,
    SegmentError,
    SegmentForeignError,
    SegmentMagicError,
    SegmentMetadataError,
    SegmentPayloadError,
    SegmentShapeError,
    SegmentTooLargeError,
    SegmentTruncatedError,
    SegmentVersionError,
)
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.state_blob.codecs import RawCodec, ZstdCodec
from shared.state_blob.segment import (
    MAX_METADATA_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_RAW_BYTES,
    SegmentIdentity,
    decode_latents,
    decode_snapshot,
    encode_latents,
    encode_snapshot,
)

LAYOUT = StateLayout(
    kda_layers=2,
    kda_heads=1,
    kda_head_dim=4,
    convolution_taps=3,
    mla_layers=2,
    latent_dim=5,
    latent_dtype="bfloat16",
    convolution_dtype="bfloat16",
)
LATENTS_IDENTITY = SegmentIdentity("model-1", "request-1", 2, 64, 75, bytes(range(16)))
SNAPSHOT_IDENTITY = replace(LATENTS_IDENTITY, start=75)
PREAMBLE = struct.Struct("<4sHBBIQ")
HEADER_BYTES = 36


@dataclass(frozen=True)
class Sample:
    """A valid segment, and the reader that accepts it."""

    data: bytes
    read: Callable[[bytes], object]

    @property
    def metadata(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgpack.unpackb(self.data[HEADER_BYTES : self.payload_start])
        return fields

    @property
    def payload(self) -> bytes:
        return self.data[self.payload_start :]

    @property
    def payload_start(self) -> int:
        return HEADER_BYTES + int.from_bytes(self.data[8:12], "little")

    def refusal(self, data: bytes) -> type[SegmentError] | None:
        """Tell why the reader refuses the data; any other error is a failure of the test."""
        try:
            self.read(data)
        except SegmentError as error:
            return type(error)
        return None

    def sealed(
        self, metadata: dict[str, Any] | bytes | None = None, payload: bytes | None = None
    ) -> bytes:
        """Rebuild the segment around other parts, with lengths and a checksum that match them."""
        fields = self.metadata if metadata is None else metadata
        packed = fields if isinstance(fields, bytes) else msgpack.packb(fields)
        payload = self.payload if payload is None else payload
        preamble = self.data[:8] + struct.pack("<IQ", len(packed), len(payload))
        return resealed(preamble + bytes(16) + packed + payload)


def resealed(data: bytes) -> bytes:
    checksum = xxhash.xxh3_128_digest(data[:20] + data[HEADER_BYTES:])
    return data[:20] + checksum + data[HEADER_BYTES:]


def read_latents(data: bytes) -> object:
    latents = decode_latents(data, LATENTS_IDENTITY, LAYOUT)
    assert latents.shape == (2, 11, 5)
    assert latents.dtype == torch.bfloat16
    return latents


def read_snapshot(data: bytes) -> object:
    snapshot = decode_snapshot(data, SNAPSHOT_IDENTITY, LAYOUT)
    assert snapshot.length == 75
    assert snapshot.recurrent.shape == (2, 1, 4, 4)
    assert snapshot.recurrent.dtype == torch.float32
    assert snapshot.convolution.shape == (2, 12, 3)
    assert snapshot.convolution.dtype == torch.bfloat16
    return snapshot


LATENTS = (torch.arange(110) / 8).reshape(2, 11, 5).bfloat16()
SNAPSHOT = KdaSnapshot(
    75, torch.arange(32.0).reshape(2, 1, 4, 4), torch.arange(72.0).reshape(2, 12, 3).bfloat16()
)
SAMPLES = {
    f"{kind} {codec.name}": sample
    for codec in (RawCodec(), ZstdCodec())
    for kind, sample in {
        "latents": Sample(
            encode_latents(LATENTS_IDENTITY, LATENTS, codec).data,
            read_latents,
        ),
        "snapshot": Sample(
            encode_snapshot(SNAPSHOT_IDENTITY, SNAPSHOT, codec).data,
            read_snapshot,
        ),
    }.items()
}
LATENTS_RAW, LATENTS_ZSTD = SAMPLES["latents raw"], SAMPLES["latents zstd"]
every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())


# --- damage on the way -----------------------------------------------------------------------

DAMAGE_BY_FIELD: list[tuple[range, set[type[SegmentError]]]] = [
    (range(4), {SegmentMagicError}),
    (range(4, 6), {SegmentVersionError}),
    (range(6, 8), {SegmentVersionError, SegmentChecksumError}),
    (range(8, 20), {SegmentTooLargeError, SegmentTruncatedError}),
    (range(20, 10_000), {SegmentChecksumError}),
]


@every_sample
@pytest.mark.parametrize("mask", [0x01, 0x02, 0x10, 0x80, 0xFF])
def test_a_change_of_any_byte_is_noticed_and_named(sample: Sample, mask: int) -> None:
    for offset in range(len(sample.data)):
        damaged = bytearray(sample.data)
        damaged[offset] ^= mask
        expected = next(errors for field, errors in DAMAGE_BY_FIELD if offset in field)
        assert sample.refusal(bytes(damaged)) in expected, offset


@every_sample
def test_a_segment_that_ends_early_or_late_is_refused(sample: Sample) -> None:
    for length in range(len(sample.data)):
        assert sample.refusal(sample.data[:length]) is SegmentTruncatedError
    for extension in (b"\0", sample.payload, sample.data):
        assert sample.refusal(sample.data + extension) is SegmentTruncatedError


@every_sample
def test_bytes_that_are_exchanged_are_noticed(sample: Sample) -> None:
    chance = random.Random(0)
    for _ in range(500):
        first, second = sorted(chance.sample(range(20, len(sample.data)), 2))
        damaged = bytearray(sample.data)
        damaged[first], damaged[second] = damaged[second], damaged[first]
        expected = None if damaged == sample.data else SegmentChecksumError
        assert sample.refusal(bytes(damaged)) is expected


@every_sample
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(sample: Sample, data: bytes) -> None:
    assert sample.refusal(data) is not None
    assert sample.refusal(sample.data[:HEADER_BYTES] + data) is not None


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        (1, 0, SegmentVersionError),
        (1, 2, SegmentVersionError),
        (2, 0, SegmentVersionError),
        (2, 3, SegmentVersionError),
        (3, 2, SegmentVersionError),
        (4, MAX_METADATA_BYTES + 1, SegmentTooLargeError),
        (4, MAX_METADATA_BYTES, SegmentTruncatedError),
        (5, MAX_PAYLOAD_BYTES + 1, SegmentTooLargeError),
        (5, MAX_PAYLOAD_BYTES, SegmentTruncatedError),
        (5, 2**64 - 1, SegmentTooLargeError),
    ],
)
def test_a_header_is_refused_by_its_first_wrong_field(
    field: int, value: int, error: type[SegmentError]
) -> None:
    header = list(PREAMBLE.unpack_from(LATENTS_ZSTD.data))
    header[field] = value
    data = resealed(PREAMBLE.pack(*header) + LATENTS_ZSTD.data[PREAMBLE.size :])
    assert LATENTS_ZSTD.refusal(data) is error


# --- segments of somebody else ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "model-2"},
        {"request_id": "request-2"},
        {"epoch": 1},
        {"epoch": 3},
        {"start": 63, "stop": 74},
        {"start": 0, "stop": 11},
        {"stop": 76},
        {"prefix_hash": bytes(16)},
    ],
    ids=str,
)
def test_a_segment_of_another_model_request_attempt_range_or_prompt_is_foreign(
    change: dict[str, Any],
) -> None:
    expected = replace(LATENTS_IDENTITY, **change)
    with pytest.raises(SegmentForeignError, match=next(iter(change))):
        decode_latents(LATENTS_ZSTD.data, expected, LAYOUT)


def test_segments_that_were_swapped_are_foreign() -> None:
    latents, snapshot = SAMPLES["latents zstd"], SAMPLES["snapshot zstd"]
    assert latents.refusal(snapshot.data) is SegmentForeignError
    assert snapshot.refusal(latents.data) is SegmentForeignError
    neighbour = replace(LATENTS_IDENTITY, start=75, stop=86)
    assert latents.refusal(encode_latents(neighbour, LATENTS).data) is SegmentForeignError


def test_a_segment_that_claims_to_be_of_the_other_kind_is_refused() -> None:
    latents, snapshot = LATENTS_RAW.data, SAMPLES["snapshot raw"].data
    latents_as_kda = resealed(latents[:6] + b"\x02" + latents[7:])
    snapshot_as_mla = resealed(snapshot[:6] + b"\x01" + snapshot[7:])
    assert LATENTS_RAW.refusal(latents_as_kda) is SegmentMetadataError
    assert SAMPLES["snapshot raw"].refusal(snapshot_as_mla) is SegmentForeignError


# --- segments of another layout --------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"mla_layers": 3}, {"latent_dim": 6}, {"latent_dtype": "float32"}, {"mla_layers": 2**40}],
    ids=str,
)
def test_latents_of_another_layout_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SegmentShapeError):
        decode_latents(LATENTS_ZSTD.data, LATENTS_IDENTITY, replace(LAYOUT, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"kda_layers": 1},
        {"kda_heads": 2},
        {"kda_head_dim": 8},
        {"convolution_taps": 2},
        {"convolution_dtype": "float32"},
        {"recurrent_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_snapshot_of_another_layout_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SegmentShapeError):
        decode_snapshot(SAMPLES["snapshot zstd"].data, SNAPSHOT_IDENTITY, replace(LAYOUT, **change))


# --- sealed by somebody who means ill --------------------------------------------------------

METADATA_CHANGES: list[tuple[dict[str, Any], type[SegmentError]]] = [
    ({"fingerprint": 1}, SegmentMetadataError),
    ({"fingerprint": b"model-1"}, SegmentMetadataError),
    ({"request_id": "r" * 65}, SegmentMetadataError),
    ({"epoch": "2"}, SegmentMetadataError),
    ({"epoch": 2.0}, SegmentMetadataError),
    ({"epoch": True}, SegmentMetadataError),
    ({"epoch": 0}, SegmentMetadataError),
    ({"start": -1}, SegmentMetadataError),
    ({"stop": None}, SegmentMetadataError),
    ({"prefix_hash": "0" * 16}, SegmentMetadataError),
    ({"prefix_hash": bytes(15)}, SegmentMetadataError),
    ({"raw_bytes": "220"}, SegmentMetadataError),
    ({"tensors": None}, SegmentMetadataError),
    ({"tensors": {}}, SegmentMetadataError),
    ({"tensors": [None]}, SegmentMetadataError),
    ({"tensors": []}, SegmentMetadataError),
    ({"comment": "an unknown field"}, SegmentMetadataError),
    ({"raw_bytes": MAX_RAW_BYTES + 1}, SegmentTooLargeError),
    ({"raw_bytes": 2**64 - 1}, SegmentTooLargeError),
    ({"stop": 2**64 - 1}, SegmentForeignError),
    ({"start": 76}, SegmentMetadataError),
    ({"epoch": 2**64 - 1}, SegmentForeignError),
    ({"raw_bytes": MAX_RAW_BYTES}, SegmentShapeError),
    ({"raw_bytes": 0}, SegmentShapeError),
]

TENSOR_CHANGES: list[tuple[dict[str, Any], type[SegmentError]]] = [
    ({"name": 1}, SegmentMetadataError),
    ({"dtype": None}, SegmentMetadataError),
    ({"shape": 110}, SegmentMetadataError),
    ({"shape": [2, 11, -5]}, SegmentMetadataError),
    ({"shape": [2, 11, 5.0]}, SegmentMetadataError),
    ({"shape": [2, 11, True]}, SegmentMetadataError),
    ({"shape": [1] * 9}, SegmentMetadataError),
    ({"wire_bytes": 219}, SegmentMetadataError),
    ({"wire_bytes": -1}, SegmentMetadataError),
    ({"offset": 0}, SegmentMetadataError),
    ({"name": "recurrent"}, SegmentShapeError),
    ({"dtype": "float8_e4m3fn"}, SegmentShapeError),
    ({"dtype": "float16"}, SegmentShapeError),
    ({"shape": [2, 5, 11]}, SegmentShapeError),
    ({"shape": [110]}, SegmentShapeError),
    ({"shape": []}, SegmentShapeError),
    ({"shape": [2**63, 2**63, 2**63]}, SegmentShapeError),
]


@pytest.mark.parametrize(("change", "error"), METADATA_CHANGES, ids=str)
def test_metadata_that_is_not_as_written_down_is_refused(
    change: dict[str, Any], error: type[SegmentError]
) -> None:
    assert LATENTS_RAW.refusal(LATENTS_RAW.sealed(LATENTS_RAW.metadata | change)) is error


@pytest.mark.parametrize(("change", "error"), TENSOR_CHANGES, ids=str)
def test_a_tensor_entry_that_is_not_as_written_down_is_refused(
    change: dict[str, Any], error: type[SegmentError]
) -> None:
    metadata = LATENTS_RAW.metadata
    metadata["tensors"][0] |= change
    assert LATENTS_RAW.refusal(LATENTS_RAW.sealed(metadata)) is error


@every_sample
def test_metadata_without_one_of_its_fields_is_refused(sample: Sample) -> None:
    for missing in sample.metadata:
        metadata = {name: value for name, value in sample.metadata.items() if name != missing}
        assert sample.refusal(sample.sealed(metadata)) is SegmentMetadataError
    for missing in sample.metadata["tensors"][0]:
        metadata = sample.metadata
        del metadata["tensors"][0][missing]
        assert sample.refusal(sample.sealed(metadata)) is SegmentMetadataError


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x80\x80",
        b"\x91\xc0",
        b"\xc0",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 60_000,
        b"\x81" * 60_000,
        b"\x81\x90\xc0",
        b"\xa1\xff",
        b"\xd7\xff" + b"\xff" * 8,
        b"\xc7\x03\xff\0\0\0",
        b"\x82\xa5epoch\x01\xa5epoch\x02",
    ],
    ids=lambda metadata: metadata[:8].hex() or "empty",
)
def test_metadata_that_is_not_one_map_is_refused(metadata: bytes) -> None:
    assert LATENTS_RAW.refusal(LATENTS_RAW.sealed(metadata)) is SegmentMetadataError


def test_metadata_with_a_repeated_key_is_refused() -> None:
    packed = bytearray(LATENTS_RAW.data[HEADER_BYTES : LATENTS_RAW.payload_start])
    packed[0] += 1
    packed += msgpack.packb("epoch") + msgpack.packb(2)
    assert LATENTS_RAW.refusal(LATENTS_RAW.sealed(bytes(packed))) is SegmentMetadataError


@pytest.mark.parametrize("change", ["drop", "repeat", "reorder"])
def test_a_snapshot_with_other_tensors_is_refused(change: str) -> None:
    sample = SAMPLES["snapshot raw"]
    recurrent, convolution = sample.metadata["tensors"]
    recurrent_payload, convolution_payload = sample.payload[:128], sample.payload[128:]
    tensors, payload = {
        "drop": ([recurrent], recurrent_payload),
        "repeat": ([recurrent, convolution, convolution], sample.payload + convolution_payload),
        "reorder": ([convolution, recurrent], convolution_payload + recurrent_payload),
    }[change]
    data = sample.sealed(sample.metadata | {"tensors": tensors}, payload)
    assert sample.refusal(data) is SegmentShapeError


def zstd_frame(content: bytes, write_content_size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=write_content_size).compress(content)


PAYLOADS = {
    "nothing": b"",
    "no frame": b"not a frame of zstd",
    "bomb": zstd_frame(bytes(2**26)),
    "bomb without a size": zstd_frame(bytes(2**26), write_content_size=False),
    "right content without a size": zstd_frame(bytes(220), write_content_size=False),
    "one byte short": zstd_frame(bytes(219)),
    "one byte long": zstd_frame(bytes(221)),
    "frame cut off": zstd_frame(random.Random(0).randbytes(220))[:-1],
    "more behind the frame": zstd_frame(bytes(220)) + b"\0",
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_a_payload_that_is_not_the_tensors_is_refused_and_costs_no_memory(payload: bytes) -> None:
    metadata = LATENTS_ZSTD.metadata
    metadata["tensors"][0]["wire_bytes"] = len(payload)
    data = LATENTS_ZSTD.sealed(metadata, payload)
    tracemalloc.start()
    try:
        assert LATENTS_ZSTD.refusal(data) is SegmentPayloadError
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_payloads_of_two_tensors_that_were_divided_elsewhere_are_refused() -> None:
    for name in ("snapshot raw", "snapshot zstd"):
        sample = SAMPLES[name]
        metadata = sample.metadata
        metadata["tensors"][0]["wire_bytes"] -= 1
        metadata["tensors"][1]["wire_bytes"] += 1
        assert sample.refusal(sample.sealed(metadata)) is SegmentPayloadError


def test_the_first_failing_check_names_the_error() -> None:
    """Start with everything wrong, and mend one thing after the other."""
    sample = LATENTS_ZSTD
    metadata = sample.metadata | {"fingerprint": "model-2", "raw_bytes": 1, "epoch": 0}
    everything_wrong = b"JUNK\x09\x09\x09\x09" + sample.sealed(metadata, b"no frame")[8:]
    assert sample.refusal(everything_wrong[:30]) is SegmentTruncatedError
    assert sample.refusal(everything_wrong) is SegmentMagicError
    assert sample.refusal(b"PRFS" + everything_wrong[4:]) is SegmentVersionError
    too_large = sample.data[:12] + b"\xff" * 8 + everything_wrong[20:]
    assert sample.refusal(too_large) is SegmentTooLargeError
    known = sample.data[:8] + everything_wrong[8:]
    assert sample.refusal(known + b"\0") is SegmentTruncatedError
    assert sample.refusal(known[:-1] + b"\0") is SegmentChecksumError
    assert sample.refusal(sample.sealed(metadata, b"no frame")) is SegmentMetadataError
    metadata["tensors"][0]["wire_bytes"] = 8
    metadata["epoch"] = 2
    assert sample.refusal(sample.sealed(metadata, b"no frame")) is SegmentForeignError
    metadata["fingerprint"] = "model-1"
    assert sample.refusal(sample.sealed(metadata, b"no frame")) is SegmentShapeError
    metadata["raw_bytes"] = 220
    assert sample.refusal(sample.sealed(metadata, b"no frame")) is SegmentPayloadError


# --- anything at all -------------------------------------------------------------------------


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Overwrite, insert, remove or repeat a few bytes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        where = chance.randrange(len(changed) + 1)
        length = chance.choice([0, 1, 1, 1, 2, 8])
        inserted = chance.choice(
            [b"", chance.randbytes(length), bytes(changed[where : where + 4]), b"\xff" * length]
        )
        changed[where : where + length] = inserted
    return bytes(changed)


@every_sample
@pytest.mark.parametrize("seed", range(2))
def test_mutated_segments_are_refused(sample: Sample, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(1500):
        data = mutated(sample.data, chance)
        assert data == sample.data or sample.refusal(data) is not None


@every_sample
@pytest.mark.parametrize("seed", range(2))
def test_mutated_segments_with_a_right_checksum_are_read_as_expected_or_refused(
    sample: Sample, seed: int
) -> None:
    chance = random.Random(seed)
    metadata = sample.data[HEADER_BYTES : sample.payload_start]
    for _ in range(1000):
        sample.refusal(resealed(mutated(sample.data, chance)))
        sample.refusal(sample.sealed(mutated(metadata, chance)))
        payload = bytearray(sample.payload)
        payload[chance.randrange(len(payload))] = chance.randrange(256)
        sample.refusal(sample.sealed(payload=bytes(payload)))


wire_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(wire_values)
def test_any_value_as_metadata_is_refused(value: Any) -> None:
    data = LATENTS_RAW.sealed(msgpack.packb(value))
    assert LATENTS_RAW.refusal(data) is SegmentMetadataError


@given(st.data())
def test_any_value_in_any_field_is_refused(data: st.DataObject) -> None:
    metadata = LATENTS_RAW.metadata
    part = data.draw(st.sampled_from([metadata, metadata["tensors"][0]]))
    name = data.draw(st.sampled_from(sorted(part)))
    part[name] = data.draw(wire_values.filter(lambda value: value != part[name]))
    assert LATENTS_RAW.refusal(LATENTS_RAW.sealed(metadata)) is not None
