"""Continuous batching: sequences join and leave between steps, and trouble stays with its own."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
import torch
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from torch import Tensor

from services.decode_worker.batch import ContinuousBatch
from services.decode_worker.metrics import DecodeMetrics
from services.decode_worker.sequence import Sequence as GrowingText
from services.decode_worker.sequence import finish_reason
from shared.compute_thread import ComputeThread
from shared.errors import BrokenLogitsError, CancelledJobError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.sampling import Draw, sample
from shared.messages import Manifest, Sampling, SegmentDescriptor, Token
from shared.streams.job_queue import JobQueue
from shared.streams.token_stream import TokenPublisher, TokenSubscription
from tests.polling import eventually
from tests.streams.conftest import begin_next, live_worker
from tests.workers.conftest import GREEDY, job

pytestmark = pytest.mark.asyncio


class NanOnDemand(Engine):
    """The real engine, whose logits for one state are broken."""

    broken_state: RequestState | None = None

    def decode(self, tokens: Sequence[int], states: Sequence[RequestState]) -> Tensor:
        logits = super().decode(tokens, states).clone()
        for row, state in enumerate(states):
            if state is self.broken_state:
                logits[row] = torch.nan
        return logits


class Decoding:
    """A batch at work on real jobs."""

    def __init__(self, engine: Engine, compute: ComputeThread, redis: Redis) -> None:
        self.engine = NanOnDemand(
            engine._model, engine.config, engine.fingerprint, engine.dtype, engine._pool
        )
        self.publisher = TokenPublisher(redis, "decode")
        self.metrics = DecodeMetrics(CollectorRegistry())
        self.batch = ContinuousBatch(self.engine, compute, self.publisher, self.metrics)
        self._redis = redis
        self._queue: JobQueue | None = None

    async def begun(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        max_tokens: int = 6,
        sampling: Sampling = GREEDY,
    ) -> tuple[GrowingText, RequestState]:
        """A sequence whose first token is emitted, and its state."""
        self._queue = self._queue or await live_worker(self._redis, "decode-1")
        asked = job(request_id, prompt=prompt, max_tokens=max_tokens, sampling=sampling)
        await self._queue.enqueue(asked, 10)
        attempt = await begin_next(self._queue)
        state = self.engine.new_state(len(prompt) + max_tokens)
        logits = self.engine.prefill([prompt], [state])
        (first,) = sample(logits, [Draw.of(sampling, prompt)])
        sequence = GrowingText(attempt, manifest(len(prompt), first), [])
        sequence.accept(first)
        return sequence, state

    def alone(self, prompt: tuple[int, ...], tokens: int) -> list[int]:
        """What one request by itself says."""
        with self.engine.new_state(len(prompt) + tokens) as state:
            text = [int(self.engine.prefill([prompt], [state]).argmax())]
            while len(text) < tokens:
                text.append(int(self.engine.decode(text[-1:], [state])[0].argmax()))
        return text


def manifest(length: int, first: Token) -> Manifest:
    segment = SegmentDescriptor(
        key="k",
        kind="kda",
        producer="r1",
        epoch=1,
        layers=1,
        codec="raw",
        start=length,
        stop=length,
        wire_bytes=1,
        raw_bytes=1,
        checksum=bytes(16),
    )
    return Manifest(
        fingerprint="f",
        segments=(segment,),
        first_token=first,
        queued=0,
        prefill=0,
    )


def text_of(sequence: GrowingText) -> list[int]:
    return [token.token_id for token in sequence.tokens]


@pytest_asyncio.fixture
async def decoding(engine: Engine, compute: ComputeThread, redis: Redis) -> AsyncIterator[Decoding]:
    decoding = Decoding(engine, compute, redis)
    await TokenSubscription(redis, "g1").show_sign_of_life(60)
    running = asyncio.create_task(decoding.batch.run())
    yield decoding
    running.cancel()
    await asyncio.wait([running])


async def count_as_emitted(redis: Redis, sequence: GrowingText) -> None:
    """Count the tokens so far as emitted: the manifest's, and those of a worker that is gone."""
    key = f"prfaas:decode:job:{{{sequence.job.request_id}}}"
    await redis.hset(key, "tokens", str(len(sequence.tokens)))


async def test_sequences_of_different_lengths_say_what_each_says_alone(
    decoding: Decoding, redis: Redis
) -> None:
    prompts = {"r1": (1, 2, 3), "r2": tuple(range(70)), "r3": (9,)}
    sequences = []
    async with asyncio.TaskGroup() as tasks:
        for number, (request_id, prompt) in enumerate(prompts.items()):
            sequence, state = await decoding.begun(request_id, prompt, max_tokens=5 + number)
            await count_as_emitted(redis, sequence)
            tasks.create_task(decoding.batch.generate(sequence, state))
            sequences.append(sequence)
    for number, (sequence, prompt) in enumerate(zip(sequences, prompts.values(), strict=True)):
        assert text_of(sequence) == decoding.alone(prompt, 5 + number)
        assert sequence.finished


async def test_a_replacement_worker_says_what_the_first_would_have_said(
    decoding: Decoding, redis: Redis
) -> None:
    prompt = (1, 2, 3)
    asked = Sampling(
        temperature=1.5,
        top_p=1,
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=2,
        seed=11,
    )
    first, first_state = await decoding.begun("first", prompt, max_tokens=30, sampling=asked)
    await count_as_emitted(redis, first)
    await decoding.batch.generate(first, first_state)

    other, state = await decoding.begun("replacement", prompt, max_tokens=30, sampling=asked)
    continued = GrowingText(other.attempt, other.manifest, first.tokens[:12])
    await count_as_emitted(redis, continued)
    decoding.engine.prefill([text_of(continued)[:-1]], [state])
    await decoding.batch.generate(continued, state)
    assert text_of(continued) == text_of(first)


async def test_a_sequence_that_leaves_does_not_disturb_the_others(
    decoding: Decoding, redis: Redis
) -> None:
    leaving, leaving_state = await decoding.begun("leaving", (4, 5, 6), max_tokens=5000)
    staying, staying_state = await decoding.begun("staying", (7, 8), max_tokens=40)
    for sequence in (leaving, staying):
        await count_as_emitted(redis, sequence)
    async with asyncio.TaskGroup() as tasks:
        left = tasks.create_task(decoding.batch.generate(leaving, leaving_state))
        stayed = tasks.create_task(decoding.batch.generate(staying, staying_state))
        await eventually(lambda: len(leaving.tokens) > 5)
        left.cancel()
        await stayed
    assert text_of(staying) == decoding.alone((7, 8), 40)
    assert len(leaving.tokens) < 5000


async def test_a_cancelled_request_ends_with_its_reason_and_others_go_on(
    decoding: Decoding, redis: Redis
) -> None:
    cancelled, cancelled_state = await decoding.begun("cancelled", (4, 5, 6), max_tokens=5000)
    other, other_state = await decoding.begun("other", (7, 8), max_tokens=30)
    for sequence in (cancelled, other):
        await count_as_emitted(redis, sequence)
    outcomes = asyncio.gather(
        decoding.batch.generate(cancelled, cancelled_state),
        decoding.batch.generate(other, other_state),
        return_exceptions=True,
    )
    await eventually(lambda: len(cancelled.tokens) > 5)
    await JobQueue(redis, "decode").cancel("cancelled")
    refusal, fine = await outcomes
    assert isinstance(refusal, CancelledJobError)
    assert fine is None


async def test_broken_logits_end_their_own_request_only(decoding: Decoding, redis: Redis) -> None:
    broken, broken_state = await decoding.begun("broken", (4, 5, 6))
    sound, sound_state = await decoding.begun("sound", (7, 8))
    for sequence in (broken, sound):
        await count_as_emitted(redis, sequence)
    decoding.engine.broken_state = broken_state
    refusal, fine = await asyncio.gather(
        decoding.batch.generate(broken, broken_state),
        decoding.batch.generate(sound, sound_state),
        return_exceptions=True,
    )
    assert isinstance(refusal, BrokenLogitsError)
    assert fine is None
    assert text_of(sound) == decoding.alone((7, 8), 6)


@pytest.mark.parametrize(
    ("generated", "token_id", "reason"),
    [(1, 7, None), (8, 7, "length"), (1, 99, "stop"), (8, 99, "stop")],
)
async def test_a_text_ends_by_length_or_by_a_stop_token(
    generated: int, token_id: int, reason: str | None
) -> None:
    asked = job(max_tokens=8).model_copy(update={"stop_token_ids": (99,)})
    assert finish_reason(asked, generated, token_id) == reason
