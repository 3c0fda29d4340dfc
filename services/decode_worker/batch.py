"""Continuous batching: one loop that decodes a token for every joined sequence, step by step.

Sequences join and leave between steps. A step uses the states of its sequences until it ends, so no
memory is freed under a computation when one of them leaves.
"""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from time import monotonic
from typing import Final

from torch import Tensor

from services.decode_worker.metrics import DecodeMetrics
from services.decode_worker.sequence import Sequence
from shared.compute_thread import ComputeThread
from shared.errors import BrokenLogitsError, PrfaasError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.sampling import sample
from shared.messages import Token
from shared.state_blob.prefix_hash import BLOCK_TOKENS
from shared.streams.connection import PASSING_ERRORS
from shared.streams.token_stream import Emission, TokenPublisher

_STEP_ERRORS: Final = (PrfaasError, RuntimeError, ValueError, *PASSING_ERRORS)
"""What a step may end with; all its sequences are then taken up again from their token logs."""


@dataclass(frozen=True, slots=True)
class _Member:
    sequence: Sequence
    state: RequestState
    ended: asyncio.Future[None]


class ContinuousBatch:
    """The sequences that are decoded together.

    Args:
        engine: that decodes.
        compute: the thread that it does so in.
        publisher: of the tokens.
        metrics: of the steps.
        keeps_snapshots: whether sequences are given the KDA state at each whole block.
    """

    def __init__(
        self,
        engine: Engine,
        compute: ComputeThread,
        publisher: TokenPublisher,
        metrics: DecodeMetrics,
        *,
        keeps_snapshots: bool = False,
    ) -> None:
        self._engine = engine
        self._compute = compute
        self._publisher = publisher
        self._metrics = metrics
        self._keeps_snapshots = keeps_snapshots
        self._members: list[_Member] = []
        self._joined = asyncio.Event()

    async def generate(self, sequence: Sequence, state: RequestState) -> None:
        """Decode a sequence to its end; a caller that is cancelled takes it out of the batch.

        `state` has consumed all of the sequence but its last token; its caller releases it.

        Raises:
            AttemptEndedError: the attempt may not go on.
            Exception: whatever the step failed with.
        """
        member = _Member(sequence, state, asyncio.get_running_loop().create_future())
        self._members.append(member)
        self._joined.set()
        try:
            await member.ended
        finally:
            self._members.remove(member)

    async def run(self) -> None:
        """Step for as long as there is anything to decode, and wait for more."""
        while True:
            members = [member for member in self._members if not member.ended.done()]
            self._metrics.batch_size.set(len(members))
            if members:
                await self._step(members)
            else:
                self._joined.clear()
                await self._joined.wait()

    async def _step(self, members: list[_Member]) -> None:
        started = monotonic()
        try:
            with ExitStack() as uses:
                for member in members:
                    uses.enter_context(member.state.in_use())
                drawn = await self._compute.run(self._decode, members)
            await self._emit(_without_broken(members, drawn))
        except _STEP_ERRORS as error:
            for member in members:
                _end(member, error)
        self._metrics.step_seconds.observe(monotonic() - started)

    def _decode(self, members: list[_Member]) -> list[Token | BrokenLogitsError]:
        """Advance every sequence by a token; logits that are broken are their own row's trouble."""
        logits = self._engine.decode(
            [member.sequence.last_token_id for member in members],
            [member.state for member in members],
        )
        if self._keeps_snapshots:
            _keep_snapshots(members)
        try:
            return list(_sample(members, logits))
        except BrokenLogitsError as broken:
            sound = [row for row in range(len(members)) if row not in broken.rows]
            tokens = iter(_sample([members[row] for row in sound], logits[sound]))
            return [broken if row in broken.rows else next(tokens) for row in range(len(members))]

    async def _emit(self, drawn: list[tuple[_Member, Token]]) -> None:
        emissions = [
            Emission(member.sequence.attempt, member.sequence.accept(token))
            for member, token in drawn
        ]
        refusals = await self._publisher.emit(emissions)
        for (member, _), emission, refusal in zip(drawn, emissions, refusals, strict=True):
            self._metrics.tokens.inc(len(emission.event.tokens))
            if refusal is not None or emission.event.finish_reason is not None:
                _end(member, refusal)


def _keep_snapshots(members: list[_Member]) -> None:
    for member in members:
        if member.state.length % BLOCK_TOKENS == 0:
            member.sequence.reached_block(member.state.snapshot())


def _sample(members: list[_Member], logits: Tensor) -> list[Token]:
    return sample(logits, [member.sequence.draw for member in members])


def _without_broken(
    members: list[_Member], drawn: list[Token | BrokenLogitsError]
) -> list[tuple[_Member, Token]]:
    sound = []
    for member, token in zip(members, drawn, strict=True):
        if isinstance(token, BrokenLogitsError):
            _end(member, token)
        else:
            sound.append((member, token))
    return sound


def _end(member: _Member, error: Exception | None) -> None:
    if member.ended.done():  # its caller left during the step
        return
    if error is None:
        member.ended.set_result(None)
    else:
        member.ended.set_exception(error)
