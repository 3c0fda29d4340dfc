"""The speed of a link is that of all transfers together, while there are any."""

import pytest

from shared.policy.link_estimate import TransferSample
from shared.state_transfer.transfer_meter import TransferMeter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_overlapping_transfers_share_their_time() -> None:
    clock = Clock()
    meter = TransferMeter(clock)
    with meter.transferring(10):
        clock.now += 1
        with meter.transferring(20):
            clock.now += 2
        clock.now += 3
    assert meter.take() == TransferSample(30, 6.0)


def test_time_without_any_transfer_does_not_count() -> None:
    clock = Clock()
    meter = TransferMeter(clock)
    for _ in range(2):
        clock.now += 100
        with meter.transferring(10):
            clock.now += 1
    assert meter.take() == TransferSample(20, 2.0)
    assert meter.take() == TransferSample(0, 0.0)


def test_what_is_taken_in_the_middle_of_a_transfer_is_not_taken_again() -> None:
    clock = Clock()
    meter = TransferMeter(clock)
    with meter.transferring(10):
        clock.now += 1
        assert meter.take() == TransferSample(0, 1.0)
        clock.now += 2
    assert meter.take() == TransferSample(10, 2.0)


def test_a_transfer_that_fails_takes_time_and_brings_nothing() -> None:
    clock = Clock()
    meter = TransferMeter(clock)

    def fail() -> None:
        with meter.transferring(10):
            clock.now += 1
            raise OSError("reset")

    with pytest.raises(OSError, match="reset"):
        fail()
    assert meter.take() == TransferSample(0, 1.0)
