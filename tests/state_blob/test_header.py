import subprocess
import sys

import pytest

from shared.errors import (
    SegmentError,
    SegmentMagicError,
    SegmentMetadataError,
    SegmentTooLargeError,
    SegmentTruncatedError,
    SegmentVersionError,
)
from shared.state_blob.header import MOST_BYTES_BEFORE_PAYLOAD, read_identity
from tests.state_blob.independent_writer import HEADER_BYTES
from tests.state_blob.samples import SAMPLES, Sample
from tests.state_blob.states import LATENTS_IDENTITY, SNAPSHOT_IDENTITY

every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())


@pytest.mark.parametrize("name", SAMPLES)
def test_the_beginning_of_a_segment_says_whose_it_is(name: str) -> None:
    sample, (kind, codec) = SAMPLES[name], name.split()[:2]
    expected = {
        "latents": ("mla", LATENTS_IDENTITY, codec, 220),
        "snapshot": ("kda", SNAPSHOT_IDENTITY, codec, 272),
    }[kind]
    for stop in (sample.metadata_stop, sample.payload_start, len(sample.data)):
        assert read_identity(sample.data[:stop]) == expected
    assert read_identity(memoryview(bytearray(sample.data))[:MOST_BYTES_BEFORE_PAYLOAD]) == expected


@every_sample
def test_less_than_the_metadata_and_more_than_the_segment_are_refused(sample: Sample) -> None:
    for stop in (0, HEADER_BYTES - 1, HEADER_BYTES, sample.metadata_stop - 1):
        with pytest.raises(SegmentTruncatedError):
            read_identity(sample.data[:stop])
    with pytest.raises(SegmentTruncatedError):
        read_identity(sample.data + b"\0")


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (0, 0, SegmentMagicError),
        (4, 1, SegmentVersionError),
        (6, 3, SegmentVersionError),
        (7, 9, SegmentVersionError),
        (7, 2, SegmentVersionError),
        (8, 2, SegmentVersionError),
        (14, 1, SegmentTooLargeError),
        (23, 1, SegmentTooLargeError),
        (12, 0, SegmentMetadataError),
        (16, 1, SegmentMetadataError),
        (HEADER_BYTES, 0xC1, SegmentMetadataError),
        (-1, 1, SegmentMetadataError),
    ],
)
def test_a_beginning_is_checked_as_far_as_it_goes(
    offset: int, value: int, error: type[SegmentError]
) -> None:
    sample = SAMPLES["latents raw"]
    data = bytearray(sample.data[: sample.payload_start])
    data[offset] = value
    with pytest.raises(error):
        read_identity(data)


def test_identities_are_read_without_torch() -> None:
    program = "import sys, shared.state_blob.header; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
