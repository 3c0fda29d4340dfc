"""The 5-gram model is a probability distribution, and counts what it was given."""

import math

import numpy as np
import pytest

from benchmarks.byte_model import BYTES, ByteModel

TEXT = b"the cat sat on the mat and the dog sat on the log; " * 8


def test_the_probabilities_of_all_bytes_after_any_context_sum_to_one() -> None:
    model = ByteModel(TEXT)
    for context in (b"the ", b"xyzt", b" cat", b"\x00\x00\x00\x00"):
        bits = []
        for byte in range(BYTES):
            whole = model.bits_per_byte(context + bytes((byte,))) * 5
            bits.append(whole - model.bits_per_byte(context) * 4)
        assert math.fsum(2 ** -np.array(bits)) == pytest.approx(1, abs=1e-9)


def test_what_was_seen_is_cheaper_than_what_was_not() -> None:
    model = ByteModel(TEXT)
    assert model.bits_per_byte(TEXT) < 1
    assert model.bits_per_byte(bytes(range(128, 256))) > 8
