"""A bad network between the regions costs time or a recompute, and never brings another state."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from services.cli.link.schedule import LinkSettings
from services.cli.link.wan_link import WanLink
from services.decode_worker.prefill_watch import PrefillWatch
from services.decode_worker.state_pull import StatePull
from services.prefill_worker.prefill import PrefillHandler
from shared.errors import LostSegmentError, SegmentError, UnavailableError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.messages import SegmentDescriptor
from shared.state_transfer.segment_coding import SegmentCoding
from shared.state_transfer.state_reader import ReadSegment, StateReader
from shared.streams.bulk_reader import BulkReader
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateStore
from tests.polling import eventually
from tests.streams.conftest import begin_next
from tests.workers.conftest import PROMPT, job

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def link(embedded_url: str) -> AsyncIterator[WanLink]:
    target = Path(embedded_url.removeprefix("unix://"))
    async with WanLink(target, LinkSettings(bandwidth=50e6, round_trip=0.01)) as link:
        yield link


@pytest_asyncio.fixture
async def over_link(link: WanLink) -> AsyncIterator[BulkReader]:
    url = f"redis://127.0.0.1:{link.port}/0"
    async with BulkReader(url, stall_limit=0.5, near_seconds=0) as bulk:
        yield bulk


class Pulling:
    """A pull of the prompt's state over the link."""

    def __init__(
        self, engine: Engine, queue: JobQueue, store: StateStore, reader: StateReader
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._names = SegmentCoding(engine.fingerprint, engine.layout).names(PROMPT, b"")
        self._watch = PrefillWatch("r1", queue, store, stall_timeout=1, after_epoch=0)

    async def _read(self, segment: SegmentDescriptor) -> ReadSegment:
        return await self._watch.patiently(lambda: self._reader.read(segment, self._names))

    async def into(self, state: RequestState) -> None:
        pull = StatePull(
            self._watch,
            self._read,
            state,
            covered=0,
            length=len(PROMPT),
            fingerprint=self._engine.fingerprint,
        )
        async with pull:
            await pull.manifest()
            await pull.finish()


@pytest_asyncio.fixture
async def pulling(
    engine: Engine,
    queue: JobQueue,
    store: StateStore,
    prefill: PrefillHandler,
    over_link: BulkReader,
    coding: SegmentCoding,
) -> Pulling:
    await queue.enqueue(job(), 10)
    await prefill.run(await begin_next(queue))
    return Pulling(engine, queue, store, StateReader(over_link, coding))


async def test_a_segment_that_is_damaged_on_its_way_is_read_once_more(
    engine: Engine, link: WanLink, pulling: Pulling
) -> None:
    link.damage_next(10_000)
    with engine.new_state(len(PROMPT) + 1) as state, engine.new_state(len(PROMPT) + 1) as own:
        await pulling.into(state)
        engine.prefill([PROMPT], [own])
        assert same(engine, state, own)


async def test_a_link_that_damages_everything_brings_nothing(
    engine: Engine, link: WanLink, pulling: Pulling
) -> None:
    link.settings = LinkSettings(bandwidth=50e6, round_trip=0.01, corruption=1e-3)
    with engine.new_state(len(PROMPT)) as state:
        with pytest.raises((LostSegmentError, UnavailableError)) as refused:
            await pulling.into(state)
        if isinstance(refused.value, LostSegmentError):
            assert isinstance(refused.value.cause, SegmentError)


def same(engine: Engine, one: RequestState, other: RequestState) -> bool:
    return torch.allclose(engine.decode([3], [one]), engine.decode([3], [other]), atol=5e-5)


async def test_a_reset_of_all_connections_is_got_over(
    engine: Engine, link: WanLink, pulling: Pulling
) -> None:
    with engine.new_state(len(PROMPT) + 1) as state, engine.new_state(len(PROMPT) + 1) as own:
        async with asyncio.TaskGroup() as tasks:
            arriving = tasks.create_task(pulling.into(state))
            await eventually(lambda: link.counters.bytes_to_client > 0)
            link.reset()
        await arriving
        engine.prefill([PROMPT], [own])
        assert same(engine, state, own)


async def test_a_link_that_stands_still_is_given_up(
    engine: Engine, link: WanLink, pulling: Pulling
) -> None:
    link.stall()
    with engine.new_state(len(PROMPT)) as state, pytest.raises(UnavailableError):
        await pulling.into(state)
