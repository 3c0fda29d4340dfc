"""The codec that is on the other side first; bytes are spared where nothing is known."""

from hypothesis import given
from hypothesis import strategies as st

from shared.policy.codec_choice import CodecRates, choose_codec, coded_seconds, raw_seconds

SPEEDS = st.floats(1e3, 1e11)
SIZES = st.integers(1, 2**34)
RATES = st.builds(CodecRates, encode=SPEEDS, decode=SPEEDS, ratio=st.floats(0.05, 1.1))
ZSTD = CodecRates(encode=400e6, decode=900e6, ratio=0.7)


@given(bandwidth=SPEEDS, size=SIZES, rates=RATES)
def test_the_choice_is_never_slower_than_the_other(
    bandwidth: float, size: int, rates: CodecRates
) -> None:
    seconds = {"raw": raw_seconds(bandwidth, size), "zstd": coded_seconds(bandwidth, size, rates)}
    assert seconds[choose_codec(bandwidth, size, rates)] == min(seconds.values())


@given(bandwidth=SPEEDS, faster=st.floats(1, 1000), size=SIZES, rates=RATES)
def test_a_faster_link_never_turns_raw_into_zstd(
    bandwidth: float, faster: float, size: int, rates: CodecRates
) -> None:
    if choose_codec(bandwidth, size, rates) == "raw":
        gain = raw_seconds(bandwidth * faster, size) - coded_seconds(
            bandwidth * faster, size, rates
        )
        assert gain <= 1e-9 * raw_seconds(bandwidth, size)


@given(size=SIZES)
def test_bytes_are_spared_on_an_unknown_link(size: int) -> None:
    assert choose_codec(None, size, ZSTD) == "zstd"


@given(bandwidth=SPEEDS, size=SIZES, speed=SPEEDS)
def test_what_does_not_become_smaller_is_never_coded(
    bandwidth: float, size: int, speed: float
) -> None:
    assert choose_codec(bandwidth, size, CodecRates(speed, speed, ratio=1.0)) == "raw"


def test_a_slow_link_takes_zstd_and_a_fast_one_raw() -> None:
    assert choose_codec(25e6, 200 * 2**20, ZSTD) == "zstd"
    assert choose_codec(10e9, 200 * 2**20, ZSTD) == "raw"
