"""Whatever happens in whatever order, a job's life follows the table and it has one owner."""

import asyncio
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from shared.job_state import TRANSITIONS, JobState
from shared.streams.connection import connect, entries_of
from shared.streams.job_queue import Attempt, Delivery, JobQueue, read_job
from tests.streams.conftest import make_job, registration

WORKERS = ("w1", "w2")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["fetch", "claim", "begin", "end", "hand back", "quarantine", "cancel", "again", "die"]
        ),
        st.sampled_from(WORKERS),
    ),
    max_size=25,
)


@dataclass
class Worker:
    queue: JobQueue
    delivery: Delivery | None = None
    attempt: Attempt | None = None


@dataclass
class Life:
    """Plays the steps against Redis and checks after each what must always hold."""

    redis: Redis
    workers: dict[str, Worker] = field(default_factory=dict)
    state: JobState | None = None
    highest_epoch: int = 0

    async def play(self, steps: list[tuple[str, str]]) -> None:
        await self.redis.flushdb()
        for name in WORKERS:
            self.workers[name] = Worker(JobQueue(self.redis, "decode", name))
            await self.workers[name].queue.register(registration(name), 60)
        await self.workers["w1"].queue.enqueue(make_job(), 10)
        await self.check()
        for step, name in steps:
            await self.take(step, self.workers[name])
            await self.check()

    async def take(self, step: str, worker: Worker) -> None:  # noqa: C901 - one case a step
        match step:
            case "fetch" if worker.delivery is None:
                # Only what is there at once: a wait in vain would say nothing.
                answer = await self.redis.xreadgroup(
                    "workers", worker.queue._worker, {"prfaas:decode:jobs": ">"}, count=1
                )
                for entry, fields in entries_of(answer):
                    worker.delivery = Delivery(entry, fields[b"job"], 1)
            case "claim" if worker.delivery is None:
                await worker.queue.register(registration(worker.queue._worker), 60)
                worker.delivery = next(iter(await worker.queue.claim_abandoned([], 1)), None)
            case "begin" if worker.delivery is not None and worker.attempt is None:
                begun = await worker.queue.begin(worker.delivery, read_job(worker.delivery))
                if isinstance(begun, Attempt):
                    assert begun.epoch > self.highest_epoch
                    self.highest_epoch = begun.epoch
                    worker.attempt = begun
            case "end" if worker.attempt is not None:
                ended = await worker.queue.end(worker.attempt, JobState.DONE)
                await worker.queue.acknowledge(worker.attempt.delivery)
                if worker.attempt.epoch < self.highest_epoch:
                    assert ended is None
                worker.delivery = worker.attempt = None
            case "hand back" if worker.attempt is not None:
                await worker.queue.hand_back(worker.attempt, counts=True)
                worker.delivery = worker.attempt = None
            case "quarantine" if worker.delivery is not None:
                await worker.queue.quarantine(worker.delivery, make_job(), "reason")
                await worker.queue.acknowledge(worker.delivery)
                worker.delivery = worker.attempt = None
            case "cancel":
                await worker.queue.cancel("r1")
            case "again":
                await worker.queue.enqueue_again(make_job(), self.highest_epoch)
            case "die":
                await worker.queue.deregister()
                worker.delivery = worker.attempt = None

    async def check(self) -> None:
        queue = self.workers["w1"].queue
        (state,) = await queue.states(["r1"])
        assert state is not None
        if self.state is not None and state is not self.state:
            assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state
        assert await queue.backlog() <= 1
        if state is JobState.QUEUED:
            assert await queue.backlog() == 1, "a queued job is never lost"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_every_life_follows_the_table(embedded_url: str, steps: list[tuple[str, str]]) -> None:
    async def play() -> None:
        async with connect(embedded_url) as redis:
            await Life(redis).play(steps)

    asyncio.run(play())
