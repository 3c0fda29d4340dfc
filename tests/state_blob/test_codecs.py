import random
import struct
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import SegmentPayloadError, SegmentVersionError
from shared.state_blob.codecs import (
    CODECS,
    DEFAULT_CODEC,
    Codec,
    ReadableBuffer,
    ZstdCodec,
    codec_named,
    codec_with_wire_id,
)

every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
element_sizes = st.sampled_from([1, 2, 4, 8])
MIB = 2**20


def zstd_frame(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(content)


def with_declared_size(frame: bytes, declared: int) -> bytes:
    """Forge the content size, which takes the last four bytes of a large frame's header."""
    end = zstandard.frame_header_size(frame)
    return frame[: end - 4] + struct.pack("<I", declared) + frame[end:]


def without_declared_size(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


@every_codec
@given(data=st.data())
def test_decoding_returns_what_was_encoded(codec: Codec, data: st.DataObject) -> None:
    size = data.draw(element_sizes)
    elements = data.draw(st.binary(max_size=2000).map(lambda b: b[: len(b) // size * size]))
    payload = codec.encode(elements, size)
    decoded = codec.decode(payload, len(elements), size)
    assert decoded.tobytes() == elements
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable


@every_codec
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_what_was_decoded_does_not_refer_to_the_payload(
    codec: Codec, wrap: Callable[[bytes | bytearray], ReadableBuffer]
) -> None:
    payload = bytearray(codec.encode(wrap(b"abcdefgh"), 2))
    decoded = codec.decode(wrap(payload), 8, 2)
    payload[:] = bytes(len(payload))
    assert decoded.tobytes() == b"abcdefgh"


def test_zstd_compresses_the_bytes_of_equal_significance_together() -> None:
    payload = ZstdCodec().encode(b"\x01\x02\x03\x04" * 100, 4)
    planes = zstandard.ZstdDecompressor().decompress(payload)
    assert planes == b"\x01" * 100 + b"\x02" * 100 + b"\x03" * 100 + b"\x04" * 100


@pytest.mark.parametrize(("dtype", "least_ratio"), [("<f4", 1.19), ("<u2", 1.45)])
def test_zstd_shrinks_normal_numbers_to_their_entropy(dtype: str, least_ratio: float) -> None:
    numbers = np.random.default_rng(0).standard_normal(MIB // 4, np.float32)
    elements = (
        numbers.tobytes() if dtype == "<f4" else (numbers.view("<u4") >> 16).astype(dtype).tobytes()
    )
    payload = ZstdCodec().encode(elements, np.dtype(dtype).itemsize)
    assert len(elements) / len(payload) > least_ratio


@pytest.mark.parametrize("level", [1, 3, 19])
@pytest.mark.parametrize("hash_log", [6, 12])
def test_any_parameters_decode_with_the_default_codec(level: int, hash_log: int) -> None:
    elements = random.Random(0).randbytes(4000)
    payload = ZstdCodec(level, hash_log).encode(elements, 4)
    assert DEFAULT_CODEC.decode(payload, 4000, 4).tobytes() == elements


@pytest.mark.parametrize(("level", "hash_log"), [(0, 6), (-1, 6), (20, 6), (1, 5), (1, 31)])
def test_parameters_that_zstd_does_not_have_are_refused_at_once(level: int, hash_log: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        ZstdCodec(level, hash_log)


def test_codecs_are_found_by_name_and_by_wire_id() -> None:
    for codec in CODECS:
        assert codec_named(codec.name) is codec
        assert codec_with_wire_id(codec.wire_id) is codec
    with pytest.raises(ValueError, match="known: raw, zstd"):
        codec_named("lz4")
    with pytest.raises(SegmentVersionError):
        codec_with_wire_id(255)


@every_codec
@given(data=st.data())
def test_any_bytes_either_decode_or_are_refused(codec: Codec, data: st.DataObject) -> None:
    size = data.draw(element_sizes)
    raw_bytes = size * data.draw(st.integers(0, 50))
    payload = data.draw(st.binary(max_size=300))
    try:
        decoded = codec.decode(payload, raw_bytes, size)
    except SegmentPayloadError:
        return
    assert len(decoded) == raw_bytes


@every_codec
def test_mutated_payloads_either_decode_or_are_refused(codec: Codec) -> None:
    chance = random.Random(0)
    elements = bytes(chance.choices(range(8), k=512))
    valid = bytes(codec.encode(elements, 4))
    for _ in range(3000):
        payload = bytearray(valid)
        for _ in range(chance.randint(1, 3)):
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        try:
            decoded = codec.decode(bytes(payload), len(elements), 4)
        except SegmentPayloadError:
            continue
        assert len(decoded) == len(elements)


@every_codec
def test_payloads_with_missing_or_additional_bytes_are_refused(codec: Codec) -> None:
    elements = random.Random(0).randbytes(400)
    valid = bytes(codec.encode(elements, 4))
    damaged = [valid[:stop] for stop in range(len(valid))]
    damaged += [valid + b"\0", valid + valid, b"\0" + valid]
    for payload in damaged:
        with pytest.raises(SegmentPayloadError):
            codec.decode(payload, len(elements), 4)


@every_codec
@pytest.mark.parametrize("raw_bytes", [0, 396, 404, 2**30])
def test_payloads_of_another_size_are_refused(codec: Codec, raw_bytes: int) -> None:
    payload = codec.encode(random.Random(0).randbytes(400), 4)
    with pytest.raises(SegmentPayloadError):
        codec.decode(payload, raw_bytes, 4)


@every_codec
def test_no_elements_have_one_encoding(codec: Codec) -> None:
    assert codec.encode(b"", 4) == b""
    assert len(codec.decode(b"", 0, 4)) == 0
    for payload in (zstd_frame(b""), b"\0", b"\x50\x2a\x4d\x18\0\0\0\0"):
        with pytest.raises(SegmentPayloadError):
            codec.decode(payload, 0, 4)


BOMBS = {
    "honest": zstd_frame(bytes(64 * MIB)),
    "forged size": with_declared_size(zstd_frame(bytes(64 * MIB)), 4096),
    "no size": without_declared_size(bytes(64 * MIB)),
    "second frame": zstd_frame(bytes(4096)) + zstd_frame(bytes(64 * MIB)),
    "empty frame first": zstd_frame(b"") + zstd_frame(bytes(64 * MIB)),
    "skippable frame first": b"\x50\x2a\x4d\x18\0\0\0\0" + zstd_frame(bytes(64 * MIB)),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_before_it_costs_memory(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(SegmentPayloadError):
            ZstdCodec().decode(bomb, 4096, 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB


def test_a_frame_that_holds_less_than_it_declares_is_refused() -> None:
    payload = with_declared_size(zstd_frame(bytes(MIB)), 2 * MIB)
    with pytest.raises(SegmentPayloadError):
        ZstdCodec().decode(payload, 2 * MIB, 4)


@every_codec
def test_one_codec_serves_many_threads(codec: Codec) -> None:
    def round_trip(seed: int) -> bool:
        elements = np.random.default_rng(seed).standard_normal(16384, np.float32).tobytes()
        return codec.decode(codec.encode(elements, 4), len(elements), 4).tobytes() == elements

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(64)))
