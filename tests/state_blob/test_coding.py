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

from shared.errors import SegmentPayloadError
from shared.state_blob import coding as coding_module
from shared.state_blob.coding import ALIGNMENT, Coding, RawCoding, ReadableBuffer, ZstdCoding

every_coding = pytest.mark.parametrize(
    "coding", [RawCoding(), ZstdCoding()], ids=lambda coding: type(coding).__name__
)
element_sizes = st.sampled_from([1, 2, 4, 8])
MIB = 2**20


def zstd_frame(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(content)


def with_declared_size(frame: bytes, declared: int) -> bytes:
    """Forge the content size, which takes the last four bytes of a large frame's header."""
    end = zstandard.frame_header_size(frame)
    return frame[: end - 4] + struct.pack("<I", declared) + frame[end:]


def with_blocks(content_bytes: int, blocks: list[tuple[int, int, bytes]]) -> bytes:
    """Make a frame of raw (0) and repeating (1) blocks: (type, size, bytes) each."""
    frame = struct.pack("<IBI", 0xFD2FB528, 0b10100000, content_bytes)
    for number, (block_type, size, encoded) in enumerate(blocks):
        header = (number == len(blocks) - 1) | block_type << 1 | size << 3
        frame += header.to_bytes(3, "little") + encoded
    return frame


def without_declared_size(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


@every_coding
@given(data=st.data())
def test_decoding_returns_what_was_encoded(coding: Coding, data: st.DataObject) -> None:
    size = data.draw(element_sizes)
    elements = data.draw(st.binary(max_size=2000).map(lambda b: b[: len(b) // size * size]))
    payload = coding.encode(elements, size)
    decoded = coding.decode(payload, len(elements), size)
    assert decoded.tobytes() == elements
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_what_zstd_decoded_does_not_refer_to_the_payload(
    wrap: Callable[[bytes | bytearray], ReadableBuffer],
) -> None:
    payload = bytearray(ZstdCoding().encode(wrap(b"abcdefgh"), 2))
    decoded = ZstdCoding().decode(wrap(payload), 8, 2)
    payload[:] = bytes(len(payload))
    assert decoded.tobytes() == b"abcdefgh"


def test_raw_bytes_are_read_where_they_are_if_they_may_be_written_there() -> None:
    payload = bytearray(b"abcdefgh")
    decoded = RawCoding().decode(payload, 8, 2)
    decoded[0] = ord("A")
    assert payload == b"Abcdefgh"


@pytest.mark.parametrize("offset", range(1, ALIGNMENT))
def test_raw_bytes_that_lie_askew_or_are_constant_are_copied(offset: int) -> None:
    for data in (bytes(64), bytearray(64)):
        payload = memoryview(data)[offset:] if isinstance(data, bytearray) else memoryview(data)
        decoded = RawCoding().decode(payload, len(payload), 4)
        assert decoded.ctypes.data % ALIGNMENT == 0
        decoded[:] = 1
        assert data == bytes(64)


def test_zstd_compresses_the_bytes_of_equal_significance_together() -> None:
    payload = ZstdCoding().encode(b"\x01\x02\x03\x04" * 100, 4)
    planes = zstandard.ZstdDecompressor().decompress(payload)
    assert planes == b"\x01" * 100 + b"\x02" * 100 + b"\x03" * 100 + b"\x04" * 100


@pytest.mark.parametrize(("dtype", "least_ratio"), [("<f4", 1.19), ("<u2", 1.45)])
def test_zstd_shrinks_normal_numbers_to_their_entropy(dtype: str, least_ratio: float) -> None:
    numbers = np.random.default_rng(0).standard_normal(MIB // 4, np.float32)
    elements = (
        numbers.tobytes() if dtype == "<f4" else (numbers.view("<u4") >> 16).astype(dtype).tobytes()
    )
    payload = ZstdCoding().encode(elements, np.dtype(dtype).itemsize)
    assert len(elements) / len(payload) > least_ratio


@pytest.mark.parametrize("level", [1, 3, 19])
@pytest.mark.parametrize("hash_log", [6, 12])
def test_any_parameters_decode_with_the_default_coding(level: int, hash_log: int) -> None:
    elements = random.Random(0).randbytes(4000)
    payload = ZstdCoding(level, hash_log).encode(elements, 4)
    assert ZstdCoding().decode(payload, 4000, 4).tobytes() == elements


@pytest.mark.parametrize(("level", "hash_log"), [(0, 6), (-1, 6), (20, 6), (1, 5), (1, 31)])
def test_parameters_that_zstd_does_not_have_are_refused_at_once(level: int, hash_log: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        ZstdCoding(level, hash_log)


@every_coding
@given(data=st.data())
def test_any_bytes_either_decode_or_are_refused(coding: Coding, data: st.DataObject) -> None:
    size = data.draw(element_sizes)
    raw_bytes = size * data.draw(st.integers(0, 50))
    payload = data.draw(st.binary(max_size=300))
    try:
        decoded = coding.decode(payload, raw_bytes, size)
    except SegmentPayloadError:
        return
    assert len(decoded) == raw_bytes


@every_coding
def test_mutated_payloads_either_decode_or_are_refused(coding: Coding) -> None:
    chance = random.Random(0)
    elements = bytes(chance.choices(range(8), k=512))
    valid = bytes(coding.encode(elements, 4))
    for _ in range(3000):
        payload = bytearray(valid)
        for _ in range(chance.randint(1, 3)):
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        try:
            decoded = coding.decode(bytes(payload), len(elements), 4)
        except SegmentPayloadError:
            continue
        assert len(decoded) == len(elements)


@every_coding
def test_payloads_with_missing_or_additional_bytes_are_refused(coding: Coding) -> None:
    elements = random.Random(0).randbytes(400)
    valid = bytes(coding.encode(elements, 4))
    damaged = [valid[:stop] for stop in range(len(valid))]
    damaged += [valid + b"\0", valid + valid, b"\0" + valid]
    for payload in damaged:
        with pytest.raises(SegmentPayloadError):
            coding.decode(payload, len(elements), 4)


@every_coding
@pytest.mark.parametrize("raw_bytes", [0, 396, 404, 2**30])
def test_payloads_of_another_size_are_refused(coding: Coding, raw_bytes: int) -> None:
    payload = coding.encode(random.Random(0).randbytes(400), 4)
    with pytest.raises(SegmentPayloadError):
        coding.decode(payload, raw_bytes, 4)


@every_coding
def test_no_elements_have_one_encoding(coding: Coding) -> None:
    assert coding.encode(b"", 4) == b""
    assert len(coding.decode(b"", 0, 4)) == 0
    for payload in (zstd_frame(b""), b"\0", b"\x50\x2a\x4d\x18\0\0\0\0"):
        with pytest.raises(SegmentPayloadError):
            coding.decode(payload, 0, 4)


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
            ZstdCoding().decode(bomb, 4096, 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB


def test_a_frame_that_holds_less_than_it_declares_is_refused() -> None:
    payload = with_declared_size(zstd_frame(bytes(MIB)), 2 * MIB)
    with pytest.raises(SegmentPayloadError):
        ZstdCoding().decode(payload, 2 * MIB, 4)


@every_coding
def test_one_coding_serves_many_threads(coding: Coding) -> None:
    def round_trip(seed: int) -> bool:
        elements = np.random.default_rng(seed).standard_normal(16384, np.float32).tobytes()
        return coding.decode(coding.encode(elements, 4), len(elements), 4).tobytes() == elements

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(64)))


def test_blocks_are_counted_by_what_they_take_in_the_frame() -> None:
    blocks = [(0, 4, b"abcd"), (1, 100, b"x"), (0, 0, b""), (1, 24, b"y")]
    frame = with_blocks(128, blocks)
    assert ZstdCoding().decode(frame, 128, 1).tobytes() == b"abcd" + b"x" * 100 + b"y" * 24
    for damaged in (frame[:-1], frame + b"\0", with_blocks(128, blocks[:-1])):
        with pytest.raises(SegmentPayloadError):
            ZstdCoding().decode(damaged, 128, 1)


def test_a_frame_of_far_too_many_blocks_is_refused_before_they_are_looked_at() -> None:
    empty = (0, 0, b"")
    ZstdCoding().decode(with_blocks(8, [empty] * 7 + [(1, 8, b"x")]), 8, 4)
    for count in (8, 1_000_000):
        frame = with_blocks(8, [empty] * 8)[:-3] + b"\0\0\0" * count + b"\x43\0\0x"
        with pytest.raises(SegmentPayloadError, match="too many blocks"):
            ZstdCoding().decode(frame, 8, 4)


def test_the_checksum_of_a_frame_is_verified_where_it_has_one() -> None:
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(400))
    assert not ZstdCoding().decode(frame, 400, 4).any()
    for damaged in (frame[:-1], frame[:-4], frame[:-1] + bytes([frame[-1] ^ 1])):
        with pytest.raises(SegmentPayloadError):
            ZstdCoding().decode(damaged, 400, 4)


def test_parts_of_planes_of_any_size_find_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    elements = random.Random(0).randbytes(4 * 1000)
    payload = ZstdCoding().encode(elements, 4)
    for part in (1, 3, 999, 1000, 1001):
        monkeypatch.setattr(coding_module, "_PART_BYTES", part)
        assert ZstdCoding().decode(payload, 4000, 4).tobytes() == elements
