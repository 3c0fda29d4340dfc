"""Whatever a reader is given, it returns what it expects or raises the error that says why not."""

import random
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import msgpack
import pytest
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
    SegmentSignatureError,
    SegmentTooLargeError,
    SegmentTruncatedError,
    SegmentVersionError,
)
from shared.state_blob.header import MAX_METADATA_BYTES, MAX_PAYLOAD_BYTES, MAX_RAW_BYTES
from shared.state_blob.segment import decode_latents, decode_snapshot, encode_latents
from tests.state_blob.independent_writer import HEADER_BYTES, PREAMBLE, sealed
from tests.state_blob.samples import SAMPLES, Sample
from tests.state_blob.states import (
    KEY,
    LATENTS,
    LATENTS_IDENTITY,
    LAYOUT,
    SNAPSHOT_IDENTITY,
)

LATENTS_RAW, LATENTS_ZSTD = SAMPLES["latents raw"], SAMPLES["latents zstd"]
LATENTS_INT8 = SAMPLES["latents int8-latent"]
every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())

# --- damage on the way -----------------------------------------------------------------------

DAMAGE_BY_FIELD: list[tuple[range, set[type[SegmentError]]]] = [
    (range(4), {SegmentMagicError}),
    (range(4, 6), {SegmentVersionError}),
    (range(6, 12), {SegmentVersionError, SegmentChecksumError}),
    (range(12, 16), {SegmentTooLargeError, SegmentTruncatedError, SegmentChecksumError}),
    (range(16, 24), {SegmentTooLargeError, SegmentTruncatedError}),
    (range(24, 40), {SegmentChecksumError}),
    (range(40, 72), {SegmentSignatureError}),
    (range(72, 10_000), {SegmentChecksumError}),
]
"""Lengths of metadata that differ by less than the padding make the same size of a segment."""


@every_sample
@pytest.mark.parametrize("mask", [0x01, 0x10, 0xFF])
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
        first, second = sorted(chance.sample([*range(24, 40), *range(72, len(sample.data))], 2))
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
        (1, 1, SegmentVersionError),
        (1, 3, SegmentVersionError),
        (2, 0, SegmentVersionError),
        (2, 3, SegmentVersionError),
        (3, 2, SegmentVersionError),
        (3, 4, SegmentVersionError),
        (4, 2, SegmentVersionError),
        (4, 2**31, SegmentVersionError),
        (5, MAX_METADATA_BYTES + 1, SegmentTooLargeError),
        (5, MAX_METADATA_BYTES, SegmentTruncatedError),
        (6, MAX_PAYLOAD_BYTES + 1, SegmentTooLargeError),
        (6, MAX_PAYLOAD_BYTES, SegmentTruncatedError),
        (6, 2**64 - 1, SegmentTooLargeError),
    ],
)
def test_a_header_is_refused_by_its_first_wrong_field(
    field: int, value: int, error: type[SegmentError]
) -> None:
    header = list(PREAMBLE.unpack_from(LATENTS_ZSTD.data))
    header[field] = value
    data = sealed(PREAMBLE.pack(*header) + LATENTS_ZSTD.data[PREAMBLE.size :])
    assert LATENTS_ZSTD.refusal(data) is error


# --- segments of somebody else ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "model-2"},
        {"producer": "request-2"},
        {"epoch": 1},
        {"epoch": 3},
        {"start": 63, "stop": 74},
        {"start": 0, "stop": 11},
        {"stop": 76},
        {"parent_hash": bytes(16)},
        {"prefix_hash": bytes(16)},
        {"first_layer": 1},
        {"layers": 1},
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
    neighbour = replace(LATENTS_IDENTITY, start=75, stop=86, parent_hash=bytes(range(16)))
    assert latents.refusal(encode_latents(neighbour, LATENTS).data) is SegmentForeignError


def test_a_segment_that_claims_to_be_of_the_other_kind_is_refused() -> None:
    latents, snapshot = LATENTS_RAW.data, SAMPLES["snapshot raw"].data
    latents_as_kda = sealed(latents[:6] + b"\x02" + latents[7:])
    snapshot_as_mla = sealed(snapshot[:6] + b"\x01" + snapshot[7:])
    assert LATENTS_RAW.refusal(latents_as_kda) is SegmentMetadataError
    assert SAMPLES["snapshot raw"].refusal(snapshot_as_mla) is SegmentMetadataError


def test_a_segment_with_a_codec_of_the_other_kind_is_refused() -> None:
    data = LATENTS_ZSTD.data
    assert LATENTS_ZSTD.refusal(sealed(data[:7] + b"\2" + data[8:])) is SegmentVersionError
    snapshot = SAMPLES["snapshot zstd"]
    data = snapshot.data
    assert snapshot.refusal(sealed(data[:7] + b"\3" + data[8:])) is SegmentVersionError


@pytest.mark.parametrize(("claimed", "sample"), [(3, LATENTS_ZSTD), (1, LATENTS_INT8)], ids=str)
def test_a_segment_with_the_tensors_of_another_codec_is_refused(
    claimed: int, sample: Sample
) -> None:
    data = sealed(sample.data[:7] + bytes([claimed]) + sample.data[8:])
    assert sample.refusal(data) is SegmentShapeError


def test_scales_that_are_no_scales_are_refused() -> None:
    metadata, payload = LATENTS_INT8.metadata, LATENTS_INT8.payload
    first = metadata["tensors"][0]["wire_bytes"]
    scales_start = -(-first // 8) * 8
    for scale in (float("nan"), float("inf"), -1.0):
        planes = b"".join(bytes([byte]) * 10 for byte in struct.pack("<f", scale))
        scales = zstd_frame(planes)
        metadata["tensors"][1]["wire_bytes"] = len(scales)
        data = LATENTS_INT8.sealed(metadata, payload[:scales_start] + scales)
        assert LATENTS_INT8.refusal(data) is SegmentPayloadError


def test_lossy_codecs_may_say_any_size_of_what_was_rounded() -> None:
    """It is a statistic there: the size that is decoded to follows from the shapes."""
    for raw_bytes in (0, 440, MAX_RAW_BYTES):
        data = LATENTS_INT8.sealed(LATENTS_INT8.metadata | {"raw_bytes": raw_bytes})
        assert LATENTS_INT8.refusal(data) is None


# --- padding ---------------------------------------------------------------------------------


@every_sample
def test_padding_behind_the_metadata_is_zero(sample: Sample) -> None:
    padding = range(sample.metadata_stop, sample.payload_start)
    assert padding, "the sample proves nothing"
    for offset in (padding[0], padding[-1]):
        data = bytearray(sample.data)
        data[offset] = 1
        assert sample.refusal(sealed(bytes(data), sample.key)) is SegmentMetadataError


def test_padding_between_tensors_is_zero() -> None:
    sample = LATENTS_INT8
    first = sample.metadata["tensors"][0]["wire_bytes"]
    assert first % 8, "the sample proves nothing"
    data = bytearray(sample.data)
    data[sample.payload_start + first] = 1
    assert sample.refusal(sealed(bytes(data))) is SegmentPayloadError


def test_a_segment_without_its_padding_is_refused() -> None:
    sample = LATENTS_RAW
    data = sample.data[: sample.metadata_stop] + sample.payload
    assert sample.refusal(sealed(data)) is SegmentTruncatedError


# --- segments of another layout --------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"mla_layers": 3}, {"mla_layers": 1}, {"latent_dim": 6}, {"mla_layers": 2**40}],
    ids=str,
)
def test_latents_of_another_layout_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SegmentShapeError):
        decode_latents(LATENTS_ZSTD.data, LATENTS_IDENTITY, replace(LAYOUT, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"kda_layers": 1},
        {"kda_layers": 2},
        {"kda_heads": 2},
        {"kda_head_dim": 8},
        {"convolution_taps": 2},
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
    ({"producer": "r" * 65}, SegmentMetadataError),
    ({"request_id": "request-1"}, SegmentMetadataError),
    ({"first_layer": -1}, SegmentMetadataError),
    ({"first_layer": 1}, SegmentMetadataError),
    ({"layers": 0}, SegmentMetadataError),
    ({"layers": 1}, SegmentForeignError),
    ({"layers": 2**64 - 1}, SegmentForeignError),
    ({"parent_hash": None}, SegmentMetadataError),
    ({"start": 75}, SegmentMetadataError),
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
    ({"dtype": "int8"}, SegmentShapeError),
    ({"dtype": "float32"}, SegmentShapeError),
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
    packed = bytearray(LATENTS_RAW.data[HEADER_BYTES : LATENTS_RAW.metadata_stop])
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


def zstd_frame(content: bytes, *, write_content_size: bool = True) -> bytes:
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
        metadata["tensors"][0]["wire_bytes"] -= 8
        metadata["tensors"][1]["wire_bytes"] += 8
        assert sample.refusal(sample.sealed(metadata)) is SegmentPayloadError


def test_the_first_failing_check_names_the_error() -> None:
    """Start with everything wrong, and mend one thing after the other."""
    sample = SAMPLES["latents zstd signed"]
    metadata = sample.metadata | {"fingerprint": "model-2", "raw_bytes": 1, "epoch": 0}
    wrong_parts = sample.sealed(metadata, b"no frame")
    everything_wrong = b"JUNK\x09\x09\x09\x09" + wrong_parts[8:]
    assert sample.refusal(everything_wrong[:70]) is SegmentTruncatedError
    assert sample.refusal(everything_wrong) is SegmentMagicError
    assert sample.refusal(b"PRFS" + everything_wrong[4:]) is SegmentVersionError
    too_large = sample.data[:16] + b"\xff" * 8 + everything_wrong[24:]
    assert sample.refusal(too_large) is SegmentTooLargeError
    known = sample.data[:12] + everything_wrong[12:]
    assert sample.refusal(known + b"\0") is SegmentTruncatedError
    changed = known[:-1] + b"\0"
    assert sample.refusal(changed) is SegmentChecksumError
    padded_wrong = bytearray(sealed(changed))
    padded_wrong[sample.metadata_stop] = 1
    assert sample.refusal(sealed(bytes(padded_wrong))) is SegmentSignatureError
    assert sample.refusal(sealed(bytes(padded_wrong), KEY)) is SegmentMetadataError
    assert sample.refusal(wrong_parts) is SegmentMetadataError
    metadata["tensors"][0]["wire_bytes"] = 8
    metadata["epoch"] = 2
    assert sample.refusal(sample.sealed(metadata, b"no frame")) is SegmentForeignError
    metadata["fingerprint"] = "model-1"
    assert sample.refusal(sample.sealed(metadata, b"no frame")) is SegmentShapeError
    metadata["raw_bytes"] = 220
    assert sample.refusal(sample.sealed(metadata, b"no frame")) is SegmentPayloadError


# --- segments of nobody with the key ----------------------------------------------------------


def test_a_segment_whose_flag_was_removed_is_refused_by_all() -> None:
    sample = SAMPLES["latents zstd signed"]
    for key in (KEY, None):
        data = sealed(sample.data[:8] + bytes(4) + sample.data[12:])
        with pytest.raises(SegmentSignatureError):
            decode_latents(data, LATENTS_IDENTITY, LAYOUT, key)


def test_an_unsigned_segment_that_claims_to_be_signed_is_refused_with_a_key() -> None:
    data = sealed(LATENTS_ZSTD.data[:8] + b"\1\0\0\0" + LATENTS_ZSTD.data[12:])
    with pytest.raises(SegmentSignatureError):
        decode_latents(data, LATENTS_IDENTITY, LAYOUT, KEY)


def test_a_change_that_only_the_mac_can_notice_is_noticed() -> None:
    sample = SAMPLES["latents raw signed"]
    forged = bytearray(sample.data)
    forged[-1] ^= 1
    assert sample.refusal(sealed(bytes(forged))) is SegmentSignatureError
    assert sample.refusal(sealed(bytes(forged), bytes(32))) is SegmentSignatureError
    assert sample.refusal(sealed(bytes(forged), KEY)) is None
