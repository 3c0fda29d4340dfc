"""What a link does to bytes, in times that the tests make up."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.cli.link.schedule import AHEAD, Flow, LinkSchedule, LinkSettings

MEGABIT = LinkSettings(bandwidth=1e6, round_trip=0.04)


@dataclass
class Crossing:
    """A schedule whose time the test drives, and what arrived of it."""

    schedule: LinkSchedule
    flows: list[Flow]
    now: float = 0.0
    lateness: float = 0.0
    """Seconds by which the schedule is asked later than it wants to be."""
    arrived: list[tuple[float, Flow, bytes]] = field(default_factory=list)

    @classmethod
    def of(cls, settings: LinkSettings, flows: int = 1, seed: str = "") -> "Crossing":
        crossing = cls(LinkSchedule(settings, seed), [Flow() for _ in range(flows)])
        for flow in crossing.flows:
            flow.is_open = True
        return crossing

    def enter(self, chunk: bytes, flow: int = 0) -> None:
        self.schedule.enter(self.flows[flow], chunk, self.now)
        self.schedule.send(self.now)

    def pass_by(self, seconds: float) -> None:
        """Let time pass, and wake whenever there is something to do."""
        until = self.now + seconds
        while (event := self._next_event()) is not None and event <= until:
            self.now = max(self.now, event)
            self._take_arrived()
            self.schedule.send(self.now)
        self.now = until

    def bytes_of(self, flow: int = 0) -> bytes:
        return b"".join(piece for _, of, piece in self.arrived if of is self.flows[flow])

    def _next_event(self) -> float | None:
        arrivals = [flow.next_arrival for flow in self.flows]
        events = [event for event in (*arrivals, self.schedule.next_turn) if event is not None]
        return min(events) + self.lateness if events else None

    def _take_arrived(self) -> None:
        for flow in self.flows:
            while (at := flow.next_arrival) is not None:
                piece = flow.take_arrived(self.now)
                if piece is None:
                    break
                self.arrived.append((at, flow, bytes(piece)))
            self.schedule.admit(flow, self.now)


def numbered(size: int, first: int = 0) -> bytes:
    return bytes((first + number) % 251 for number in range(size))


chunks = st.lists(
    st.tuples(
        st.floats(0, 0.05).filter(lambda seconds: seconds == 0 or seconds > 1e-6),
        st.integers(0, 2),
        st.integers(1, 20_000),
    ),
    max_size=20,
)
links = st.builds(
    LinkSettings,
    bandwidth=st.sampled_from([0.0, 1e5, 1e6, 1e9]),
    round_trip=st.floats(0, 0.2),
    jitter=st.sampled_from([0.0, 0.001, 0.3]),
)


@given(links, chunks)
def test_each_flow_arrives_whole_and_in_order(
    settings: LinkSettings, sent: list[tuple[float, int, int]]
) -> None:
    crossing = Crossing.of(settings, flows=3)
    entered = [b"", b"", b""]
    for pause, flow, size in sent:
        crossing.pass_by(pause)
        chunk = numbered(size, first=len(entered[flow]))
        crossing.enter(chunk, flow)
        entered[flow] += chunk
    crossing.pass_by(1000)
    assert [crossing.bytes_of(flow) for flow in range(3)] == entered


@given(links.filter(lambda settings: settings.jitter == 0), chunks, st.floats(0, 0.02))
def test_no_more_arrives_than_the_bandwidth_carries(
    settings: LinkSettings, sent: list[tuple[float, int, int]], lateness: float
) -> None:
    crossing = Crossing.of(settings, flows=3)
    crossing.lateness = lateness
    for pause, flow, size in sent:
        crossing.pass_by(pause)
        crossing.enter(numbered(size), flow)
    crossing.pass_by(1000)
    in_time = sorted((at, len(piece)) for at, _, piece in crossing.arrived)
    for (before, _), (at, size) in pairwise(in_time):
        assert at - before >= settings.seconds_for(size) - 1e-9


def test_a_piece_arrives_half_a_round_trip_after_its_last_bit_left() -> None:
    crossing = Crossing.of(MEGABIT)
    crossing.enter(bytes(1000))
    crossing.pass_by(1)
    assert crossing.arrived[0][0] == pytest.approx(0.008 + 0.02)


def test_the_link_never_idles_while_bytes_wait_though_it_is_looked_at_late() -> None:
    crossing = Crossing.of(MEGABIT)
    crossing.lateness = AHEAD / 2
    crossing.enter(bytes(125_000))
    crossing.pass_by(10)
    assert crossing.arrived[-1][0] == pytest.approx(1 + 0.02)


def test_a_link_without_a_limit_only_delays() -> None:
    crossing = Crossing.of(LinkSettings(round_trip=0.04))
    crossing.enter(bytes(10_000_000))
    crossing.pass_by(1)
    assert len(crossing.bytes_of()) == 10_000_000
    assert {at for at, _, _ in crossing.arrived} == {0.02}


def test_flows_share_the_link_by_bytes_whatever_their_chunks_are() -> None:
    crossing = Crossing.of(MEGABIT, flows=3)
    crossing.enter(bytes(125_000), 0)
    for _ in range(500):
        crossing.enter(bytes(250), 1)
    crossing.enter(bytes(125_000), 2)
    crossing.pass_by(1.5)
    carried = [len(crossing.bytes_of(flow)) for flow in range(3)]
    assert max(carried) - min(carried) <= 2 * MEGABIT.piece_bytes
    assert sum(carried) == pytest.approx(1e6 * (1.5 - 0.02) / 8, abs=MEGABIT.piece_bytes)


def test_a_short_message_does_not_wait_for_the_backlog_of_another_flow() -> None:
    crossing = Crossing.of(MEGABIT, flows=2)
    crossing.enter(bytes(1_000_000), 0)
    crossing.pass_by(1)
    crossing.enter(b"ping", 1)
    crossing.pass_by(10)
    (ping,) = [at for at, flow, _ in crossing.arrived if flow is crossing.flows[1]]
    longest_turn = MEGABIT.seconds_for(MEGABIT.piece_bytes)
    assert ping <= 1 + AHEAD + 2 * longest_turn + 0.02 + 1e-3


def test_bytes_that_nobody_takes_stop_the_flow_and_not_the_others() -> None:
    crossing = Crossing.of(MEGABIT, flows=2)
    stuck, other = crossing.flows
    crossing.flows = [other]
    crossing.schedule.enter(stuck, bytes(1_000_000), 0.0)
    crossing.enter(numbered(50_000))
    crossing.pass_by(10)
    assert crossing.bytes_of() == numbered(50_000)
    assert stuck.travelling_bytes < MEGABIT.travelling_bytes + MEGABIT.piece_bytes


def test_a_flow_that_was_stuck_cannot_use_the_time_that_it_did_not() -> None:
    crossing = Crossing.of(MEGABIT)
    (stuck,) = crossing.flows
    crossing.flows = []
    crossing.schedule.enter(stuck, bytes(1_000_000), 0.0)
    crossing.pass_by(100)
    crossing.flows = [stuck]
    crossing.pass_by(1)
    fresh = sum(len(piece) for at, _, piece in crossing.arrived if at > 100)
    assert 0 < fresh <= 1e6 * 1 / 8


def test_other_settings_hold_for_what_is_not_on_its_way_yet() -> None:
    crossing = Crossing.of(MEGABIT)
    crossing.enter(bytes(250_000))
    crossing.pass_by(1)
    crossing.schedule.settings = replace(MEGABIT, bandwidth=10e6, round_trip=0.0)
    crossing.pass_by(10)
    assert crossing.arrived[-1][0] == pytest.approx(1 + 0.1, abs=0.03)
    times = [at for at, _, _ in crossing.arrived]
    assert times == sorted(times), "nothing overtakes what is on its way"


def changes(before: bytes, after: bytes) -> list[int]:
    assert len(before) == len(after)
    return [place for place, pair in enumerate(zip(before, after, strict=True)) if len({*pair}) > 1]


def carried(settings: LinkSettings, chunks: Iterable[bytes], seed: str = "") -> bytes:
    crossing = Crossing.of(settings, seed=seed)
    for chunk in chunks:
        crossing.enter(chunk)
        crossing.pass_by(0.1)
    return crossing.bytes_of()


def test_corruption_changes_the_expected_share_of_bytes_whatever_the_chunks() -> None:
    settings = LinkSettings(corruption=0.01)
    whole = changes(bytes(200_000), carried(settings, [bytes(200_000)], "seed"))
    in_parts = changes(bytes(200_000), carried(settings, [bytes(100)] * 2000, "seed"))
    for changed in (whole, in_parts):
        assert len(changed) == pytest.approx(2000, rel=0.1)
        middle = sum(place < 100_000 for place in changed)
        assert middle == pytest.approx(1000, rel=0.15), "evenly"


def test_corruption_is_repeated_by_its_seed() -> None:
    settings = LinkSettings(corruption=1e-3)
    one, same, other = (carried(settings, [bytes(50_000)], seed) for seed in ("1", "1", "2"))
    assert one == same
    assert one != other


@pytest.mark.parametrize(("corruption", "changed"), [(0.0, 0), (1.0, 1000)])
def test_corruption_of_nothing_and_of_everything(corruption: float, changed: int) -> None:
    settings = LinkSettings(corruption=corruption)
    assert len(changes(bytes(1000), carried(settings, [bytes(1000)]))) == changed


def test_one_byte_of_the_next_large_chunk_is_changed_once() -> None:
    crossing = Crossing.of(LinkSettings())
    crossing.schedule.damage_next(larger_than=100)
    for size in (100, 101, 1000):
        crossing.enter(bytes(size))
    crossing.pass_by(1)
    (changed,) = changes(bytes(1201), crossing.bytes_of())
    assert 100 <= changed < 201


def test_the_end_of_a_flow_comes_after_its_bytes() -> None:
    crossing = Crossing.of(replace(MEGABIT, jitter=0.5))
    crossing.enter(numbered(5000))
    crossing.enter(b"")
    crossing.pass_by(10)
    pieces = [piece for _, _, piece in crossing.arrived]
    assert [piece == b"" for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("bandwidth", -1.0),
        ("bandwidth", float("nan")),
        ("round_trip", 61.0),
        ("jitter", float("inf")),
        ("corruption", 1.5),
    ],
)
def test_impossible_settings_are_refused_by_name(field_name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field_name):
        LinkSettings(**{field_name: value})
