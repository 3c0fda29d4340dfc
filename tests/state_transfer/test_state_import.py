"""Segments are read side by side, imported in their order, and nothing is written afterwards."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import torch

from shared.errors import LostSegmentError, StateLostError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.presets import write_random_checkpoint
from shared.kimi_linear.request_state import RequestState
from shared.messages import SegmentDescriptor
from shared.state_transfer.segment_coding import LatentsPart
from shared.state_transfer.state_import import StateImport
from shared.state_transfer.state_reader import ReadSegment
from tests.polling import eventually

pytestmark = pytest.mark.asyncio

TOKENS = 8


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, "tiny")
    return Engine.load(directory, "float32", threads=1)


def descriptor(number: int) -> SegmentDescriptor:
    return SegmentDescriptor(
        key=f"{number}",
        kind="mla",
        producer="r1",
        epoch=1,
        layers=1,
        codec="raw",
        start=TOKENS * number,
        stop=TOKENS * (number + 1),
        wire_bytes=3,
        raw_bytes=7,
        checksum=bytes(16),
    )


class Store:
    """Gives segments when the test says so; each is full of its own number."""

    def __init__(self, engine: Engine) -> None:
        self._layout = engine.layout
        self.asked: list[int] = []
        self.failures: dict[int, StateLostError] = {}
        self._given: dict[int, asyncio.Event] = {}

    async def read(self, segment: SegmentDescriptor) -> ReadSegment:
        number = int(segment.key)
        self.asked.append(number)
        await self._gate(number).wait()
        if number in self.failures:
            raise LostSegmentError(self.failures[number], segment.key, of_snapshot=False)
        latents = torch.full(self._layout.latents_shape(TOKENS), float(number))
        part = LatentsPart(segment.start, segment.stop, latents)
        return ReadSegment(segment, np.empty(3, np.uint8).data, part)

    def give(self, *numbers: int) -> None:
        for number in numbers:
            self._gate(number).set()

    def _gate(self, number: int) -> asyncio.Event:
        return self._given.setdefault(number, asyncio.Event())


@pytest.fixture
def store(engine: Engine) -> Store:
    return Store(engine)


@pytest.fixture
def new_state(engine: Engine) -> Callable[[], RequestState]:
    return lambda: engine.new_state(20 * TOKENS)


def latents_of(state: RequestState, numbers: int) -> list[float]:
    state.length = TOKENS * numbers  # as if it were whole
    return [float(value) for value in state.export_latents(0, state.length)[0, ::TOKENS, 0]]


async def test_segments_that_come_in_any_order_are_imported_in_theirs(
    store: Store, new_state: Callable[[], RequestState]
) -> None:
    order: list[str] = []

    async def note(read: ReadSegment) -> None:
        order.append(read.segment.key)

    with new_state() as state:
        async with StateImport(store.read, state, note) as pieces:
            for number in range(4):
                pieces.add(descriptor(number))
            store.give(3, 2, 1)
            await eventually(lambda: store.asked == [0, 1, 2, 3])
            assert order == []
            store.give(0)
            await pieces.finish()
            assert (pieces.raw_bytes, pieces.wire_bytes) == (4 * 7, 4 * 3)
        assert order == ["0", "1", "2", "3"]
        assert latents_of(state, 4) == [0, 1, 2, 3]


async def test_only_a_few_segments_are_in_memory_at_a_time(
    store: Store, new_state: Callable[[], RequestState]
) -> None:
    with new_state() as state:
        async with StateImport(store.read, state) as pieces:
            for number in range(12):
                pieces.add(descriptor(number))
            await eventually(lambda: len(store.asked) == 4)
            store.give(1, 2, 3)
            await asyncio.sleep(0)  # read, but not to be let go of before 0 is in its place
            assert len(store.asked) == 4
            store.give(*range(12))
            await pieces.finish()
        assert latents_of(state, 12) == list(range(12))


async def test_the_first_segment_that_fails_is_what_the_import_fails_with(
    store: Store, new_state: Callable[[], RequestState]
) -> None:
    store.failures = {1: StateLostError("gone"), 2: StateLostError("gone, too")}
    store.give(*range(4))
    with new_state() as state:
        async with StateImport(store.read, state) as pieces:
            for number in range(4):
                pieces.add(descriptor(number))
            with pytest.raises(LostSegmentError, match=r"^gone$") as lost:
                await pieces.finish()
            assert lost.value.key == "1"
            with pytest.raises(LostSegmentError):
                pieces.check()


async def test_nothing_is_written_once_an_import_is_cleared(
    store: Store, new_state: Callable[[], RequestState]
) -> None:
    with new_state() as state:
        async with StateImport(store.read, state) as pieces:
            pieces.add(descriptor(0))
            pieces.add(descriptor(1))
            store.give(0)
            await eventually(lambda: pieces.raw_bytes == 7)
            await pieces.clear()
            store.give(1)
            assert pieces.raw_bytes == 7
            await pieces.finish()  # of nothing
        assert latents_of(state, 1) == [0]
