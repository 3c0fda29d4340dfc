"""Thousands of segments that nobody wrote: each is refused by name, or is the original, bit by bit.

What carries a right checksum, and for readers with a key a right MAC, was written by somebody who
could: of that a reader demands that it is what it expects, at bounded cost.
"""

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import (
    SegmentError,
    SegmentForeignError,
    SegmentMetadataError,
    SegmentPayloadError,
    SegmentSignatureError,
)
from shared.state_blob.prefix_hash import PrefixNames, root
from shared.state_blob.segment import (
    SegmentIdentity,
    decode_latents,
    decode_snapshot,
    encode_latents,
    encode_snapshot,
    read_identity,
)
from tests.state_blob.independent_writer import HEADER_BYTES, MAC, sealed
from tests.state_blob.samples import SAMPLES, Sample
from tests.state_blob.states import (
    KEY,
    LATENTS,
    LATENTS_IDENTITY,
    LAYOUT,
    SNAPSHOT,
    SNAPSHOT_IDENTITY,
    same_bits,
)

CASES = 500
MIB = 2**20
Mutation = Callable[[Sample, random.Random], bytes]

every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
SIGNED = {name: sample for name, sample in SAMPLES.items() if sample.key is not None}
every_signed_sample = pytest.mark.parametrize("sample", SIGNED.values(), ids=SIGNED.keys())


def bit_flips(sample: Sample, chance: random.Random) -> bytes:
    data = bytearray(sample.data)
    for _ in range(chance.randint(1, 3)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def edits(sample: Sample, chance: random.Random) -> bytes:
    """Overwrite, insert, remove or repeat a few bytes."""
    return edited(sample.data, chance)


def edited(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        where = chance.randrange(len(changed) + 1)
        length = chance.choice([0, 1, 1, 1, 2, 8])
        inserted = chance.choice(
            [b"", chance.randbytes(length), bytes(changed[where : where + 4]), b"\xff" * length]
        )
        changed[where : where + length] = inserted
    return bytes(changed)


def truncation(sample: Sample, chance: random.Random) -> bytes:
    return sample.data[: chance.randrange(len(sample.data))]


def extension(sample: Sample, chance: random.Random) -> bytes:
    return sample.data + chance.choice([chance.randbytes(chance.randint(1, 99)), sample.data])


def reordered_parts(sample: Sample, chance: random.Random) -> bytes:
    size = chance.choice([1, 8, 64])
    parts = [sample.data[start : start + size] for start in range(0, len(sample.data), size)]
    first, second = chance.sample(range(len(parts)), 2)
    parts[first], parts[second] = parts[second], parts[first]
    return b"".join(parts)


def spliced(sample: Sample, chance: random.Random) -> bytes:
    """The beginning of one segment and the end of another."""
    other = chance.choice(list(SAMPLES.values()))
    cut = chance.choice([HEADER_BYTES, sample.payload_start, chance.randrange(len(sample.data))])
    return sample.data[:cut] + other.data[cut:]


def other_metadata(sample: Sample, chance: random.Random) -> bytes:
    packed = sample.data[HEADER_BYTES : sample.metadata_stop]
    return sample.sealed(edited(packed, chance))


def other_payload(sample: Sample, chance: random.Random) -> bytes:
    payload = bytearray(sample.payload)
    payload[chance.randrange(len(payload))] = chance.randrange(256)
    return sample.sealed(payload=bytes(payload))


def lying_sizes(sample: Sample, chance: random.Random) -> bytes:
    """Metadata of which a number is another one, often at some limit."""
    metadata = sample.metadata
    lies = [0, 1, 7, 8, 2**16, 2**30, 2**30 + 1, 2**31, 2**32, 2**63, 2**64 - 1]
    tensor = chance.choice(metadata["tensors"])
    where: dict[Any, Any] = chance.choice([metadata, tensor, tensor["shape"]])
    names = range(len(where)) if isinstance(where, list) else list(where)
    name = chance.choice([name for name in names if isinstance(where[name], int)])
    where[name] = chance.choice([*lies, where[name] + 1, max(0, where[name] - 1)])
    return sample.sealed(metadata)


def lying_header(sample: Sample, chance: random.Random) -> bytes:
    lies = struct.pack("<Q", chance.choice([0, 1, 2**16, 2**30, 2**31, 2**63, 2**64 - 1]))
    start = chance.choice([4, 6, 7, 8, 12, 16])
    stop = min(24, start + chance.choice([1, 2, 4, 8]))
    return sample.data[:start] + lies[: stop - start] + sample.data[stop:]


def bomb(sample: Sample, chance: random.Random) -> bytes:
    """One tensor becomes a frame of much more, or one that says it is."""
    content = bytes(chance.choice([1, 219, 221, 4 * MIB]))
    compressor = zstandard.ZstdCompressor(write_content_size=chance.random() < 0.7)
    frame = bytearray(compressor.compress(content))
    for _ in range(chance.randint(0, 2)):
        frame[chance.randrange(len(frame))] = chance.choice([0, 0xFF, chance.randrange(256)])
    metadata, parts = sample.metadata, sample_parts(sample)
    number = chance.randrange(len(parts))
    parts[number] = bytes(frame)
    metadata["tensors"][number]["wire_bytes"] = len(frame)
    return sample.sealed(metadata, joined(parts))


def reordered_tensors(sample: Sample, chance: random.Random) -> bytes:
    """Tensors exchanged, in the metadata or the payload alone, or one of them left out."""
    metadata, parts = sample.metadata, sample_parts(sample)
    chance.choice([metadata["tensors"].reverse, parts.reverse, parts.pop])()
    return sample.sealed(metadata, joined(parts))


def sample_parts(sample: Sample) -> list[bytes]:
    parts, stop = [], 0
    for tensor in sample.metadata["tensors"]:
        start = -(-stop // 8) * 8
        stop = start + tensor["wire_bytes"]
        parts.append(sample.payload[start:stop])
    return parts


def joined(parts: list[bytes]) -> bytes:
    payload = b""
    for part in parts:
        payload += bytes(-len(payload) % 8) + part
    return payload


MUTATIONS: list[Mutation] = [bit_flips, edits, truncation, extension, reordered_parts, spliced]
SEALED_MUTATIONS: list[Mutation] = [
    other_metadata,
    other_payload,
    lying_sizes,
    bomb,
    reordered_tensors,
]


def original_or_refused(sample: Sample, data: bytes) -> None:
    """Read with the sample's key; anything that is read has to be the original."""
    try:
        found = sample.read(data, sample.key)
    except SegmentError:
        return
    expected = sample.read(sample.data, sample.key)
    assert all(same_bits(*pair) for pair in zip(found, expected, strict=True))


# --- by somebody who can write bytes only ------------------------------------------------------


@every_sample
@pytest.mark.parametrize("mutate", [*MUTATIONS, lying_header], ids=lambda mutate: mutate.__name__)
def test_what_was_damaged_is_refused_or_the_original(sample: Sample, mutate: Mutation) -> None:
    chance = random.Random(mutate.__name__)
    for _ in range(CASES // 4):
        original_or_refused(sample, mutate(sample, chance))


@every_signed_sample
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_without_the_key_a_right_checksum_is_of_no_use(sample: Sample, mutate: Mutation) -> None:
    chance = random.Random(mutate.__name__)
    for _ in range(CASES // 4):
        data = mutate(sample, chance)
        original_or_refused(sample, sealed(data))
        original_or_refused(sample, sealed(data, chance.randbytes(32)))


@every_signed_sample
@pytest.mark.parametrize("mutate", SEALED_MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_without_the_key_no_other_content_is_read(sample: Sample, mutate: Mutation) -> None:
    """Neither unsigned, nor signed with another key, nor with the original's MAC."""
    chance = random.Random(mutate.__name__)
    for _ in range(CASES // 20):
        data = mutate(sample, chance)
        if data == sample.data:
            continue
        unsigned = data[:8] + bytes(4) + data[12 : MAC.start] + bytes(32) + data[MAC.stop :]
        old_mac = data[: MAC.start] + sample.data[MAC] + data[MAC.stop :]
        for forgery in (sealed(unsigned), sealed(data, bytes(32)), sealed(old_mac)):
            assert sample.refusal(forgery) is SegmentSignatureError


# --- by somebody who can write segments --------------------------------------------------------


@every_sample
@pytest.mark.parametrize("mutate", [*MUTATIONS, lying_header], ids=lambda mutate: mutate.__name__)
def test_what_was_damaged_before_it_was_sealed_is_refused_or_as_expected(
    sample: Sample, mutate: Mutation
) -> None:
    chance = random.Random(mutate.__name__)
    for _ in range(CASES // 4):
        sample.refusal(sealed(mutate(sample, chance), sample.key))


@every_sample
@pytest.mark.parametrize("mutate", SEALED_MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_content_that_lies_is_refused_or_as_expected_and_costs_no_memory(
    sample: Sample, mutate: Mutation
) -> None:
    chance = random.Random(mutate.__name__)
    forgeries = [mutate(sample, chance) for _ in range(CASES // 5)]
    tracemalloc.start()
    try:
        for data in forgeries:
            sample.refusal(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB


# --- another's segment in place of the right one -----------------------------------------------


def other_identities(own: SegmentIdentity) -> Iterator[SegmentIdentity]:
    """All that differ from it in one field, or as another request's may."""
    prompt = list(range(own.stop))
    tenant = PrefixNames(root(own.fingerprint, b"another tenant"), prompt)
    yield replace(own, parent_hash=tenant.at(own.start), prefix_hash=tenant.at(own.stop))
    yield replace(own, fingerprint="model-2", producer="request-2")
    for field in fields(own):
        value: Any = getattr(own, field.name)
        others: list[Any] = [bytes(16)]
        if isinstance(value, str):
            others = [value + "x"]
        elif isinstance(value, int):
            others = [value + 1, value - 1 if value else 2]
        for other in others:
            change: dict[str, Any] = {field.name: other}
            yield replace(own, **change)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_segment_that_is_replayed_for_another_use_is_foreign(key: bytes | None) -> None:
    latents = encode_latents(LATENTS_IDENTITY, LATENTS, key=key).data
    snapshot = encode_snapshot(SNAPSHOT_IDENTITY, SNAPSHOT, key=key).data
    for wanted in other_identities(LATENTS_IDENTITY):
        with pytest.raises(SegmentForeignError):
            decode_latents(latents, wanted, LAYOUT, key)
    for wanted in other_identities(SNAPSHOT_IDENTITY):
        with pytest.raises(SegmentForeignError):
            decode_snapshot(snapshot, wanted, LAYOUT, key)


@pytest.mark.parametrize("key", [None, KEY])
def test_pieces_of_a_snapshot_do_not_stand_for_each_other(key: bytes | None) -> None:
    first, second = SNAPSHOT.split(1)
    identities = [
        replace(SNAPSHOT_IDENTITY, first_layer=piece.first_layer, layers=1)
        for piece in (first, second)
    ]
    pieces = [
        encode_snapshot(identity, piece, key=key).data
        for identity, piece in zip(identities, (first, second), strict=True)
    ]
    for data, wanted in ((pieces[1], identities[0]), (pieces[0], SNAPSHOT_IDENTITY)):
        with pytest.raises(SegmentForeignError):
            decode_snapshot(data, wanted, LAYOUT, key)
    decoded = decode_snapshot(pieces[1], identities[1], LAYOUT, key)
    assert torch.equal(decoded.recurrent, second.recurrent)


# --- anything at all ---------------------------------------------------------------------------

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
    sample = SAMPLES["latents raw"]
    data = sample.sealed(msgpack.packb(value))
    assert sample.refusal(data) is SegmentMetadataError


@given(st.data())
def test_any_value_in_any_field_is_refused(data: st.DataObject) -> None:
    sample = SAMPLES["latents raw"]
    metadata = sample.metadata
    part = data.draw(st.sampled_from([metadata, metadata["tensors"][0]]))
    name = data.draw(st.sampled_from(sorted(part)))
    part[name] = data.draw(wire_values.filter(lambda value: value != part[name]))
    assert sample.refusal(sample.sealed(metadata)) is not None


@every_sample
def test_any_beginning_has_the_samples_identity_or_is_refused(sample: Sample) -> None:
    chance = random.Random(0)
    expected = read_identity(sample.data)
    for _ in range(CASES):
        mutate = chance.choice([bit_flips, edits, truncation, lying_header])
        data = mutate(sample, chance)[: chance.choice([sample.payload_start, len(sample.data)])]
        try:
            found = read_identity(data)
        except SegmentError:
            continue
        assert [type(value) for value in found] == [type(value) for value in expected]


def test_the_bombs_are_refused_for_what_they_are() -> None:
    chance = random.Random(0)
    refusals = {
        SAMPLES["latents zstd"].refusal(bomb(SAMPLES["latents zstd"], chance)) for _ in range(50)
    }
    assert refusals == {SegmentPayloadError}
