"""Bandwidths and times as people write them."""

import pytest

from shared.quantities import parse_bandwidth, parse_duration
from shared.settings import split_address


@pytest.mark.parametrize(
    ("written", "bits"),
    [
        ("0", 0),
        ("1500", 1500),
        ("64k", 64e3),
        ("200M", 200e6),
        ("200 Mbit/s", 200e6),
        ("2.5Gbps", 2.5e9),
    ],
)
def test_a_bandwidth_is_read_in_bits_a_second(written: str, bits: float) -> None:
    assert parse_bandwidth(written) == bits


@pytest.mark.parametrize("written", ["", "M", "200MB", "200Mb", "-1", "1e6", "1,5G", "fast"])
def test_what_is_no_bandwidth_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="is not a bandwidth"):
        parse_bandwidth(written)


@pytest.mark.parametrize(
    ("written", "seconds"), [("0", 0), ("2", 2), ("40ms", 0.04), ("1.5 s", 1.5), ("250us", 250e-6)]
)
def test_a_time_is_read_in_seconds(written: str, seconds: float) -> None:
    assert parse_duration(written) == pytest.approx(seconds)


@pytest.mark.parametrize("written", ["", "ms", "40MS", "1m", "-1ms", "1h"])
def test_what_is_no_time_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_duration(written)


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("localhost:80", ("localhost", 80)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_an_address_is_host_and_port(written: str, address: tuple[str, int]) -> None:
    assert split_address(written) == address


@pytest.mark.parametrize(
    "written", ["", "80", ":80", "host", "host:", "host:65536", "::1:80", "u@host:80", "host:80/x"]
)
def test_what_is_no_address_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        split_address(written)
