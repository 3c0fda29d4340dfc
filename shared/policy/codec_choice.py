"""Whether to compress what crosses a link: the faster way, by the numbers that were measured."""

from dataclasses import dataclass
from typing import Literal

from shared.policy.segment_size import SEGMENT_BYTES

CodecChoice = Literal["raw", "zstd"]


@dataclass(frozen=True, slots=True)
class CodecRates:
    """What was measured of a codec on states like those to be sent."""

    encode: float
    """Bytes a second, before encoding; more than 0."""
    decode: float
    """Bytes a second, after decoding; more than 0."""
    ratio: float
    """Encoded bytes for each byte; more than 0."""


def raw_seconds(bandwidth: float, raw_bytes: int) -> float:
    """Time that a state takes as it is over a link of `bandwidth` bytes a second."""
    return raw_bytes / bandwidth


def coded_seconds(bandwidth: float, raw_bytes: int, rates: CodecRates) -> float:
    """Time that a state takes encoded: that of the slowest stage, and the others' first segment."""
    first = min(raw_bytes, SEGMENT_BYTES)
    seconds_a_byte = (1 / rates.encode, rates.ratio / bandwidth, 1 / rates.decode)
    slowest = max(seconds_a_byte)
    return raw_bytes * slowest + first * (sum(seconds_a_byte) - slowest)


def choose_codec(bandwidth: float | None, raw_bytes: int, rates: CodecRates) -> CodecChoice:
    """Choose the codec that has the state on the other side first.

    Args:
        bandwidth: of the link in bytes a second, more than 0; None if it was not measured yet,
            when bytes are spared.
        raw_bytes: of the state before encoding.
        rates: of zstd.
    """
    if bandwidth is None:
        return "zstd"
    if raw_seconds(bandwidth, raw_bytes) <= coded_seconds(bandwidth, raw_bytes, rates):
        return "raw"
    return "zstd"
