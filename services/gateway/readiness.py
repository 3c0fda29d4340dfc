"""Tells whether a completion could be served now: both regions answer, have workers, and agree."""

import asyncio
from collections.abc import Sequence
from typing import Final

from shared.errors import MessageError
from shared.messages import WorkerRegistration
from shared.streams.connection import PASSING_ERRORS
from shared.streams.job_queue import JobQueue

_REMEMBER_SECONDS: Final = 0.25
"""An answer is given again for this long: nobody can hammer Redis through it."""
_PROBE_SECONDS: Final = 2.0


class Readiness:
    """Looks at the workers of both queues."""

    def __init__(self, prefill_queue: JobQueue, decode_queue: JobQueue) -> None:
        self._queues = (prefill_queue, decode_queue)
        self._probing = asyncio.Lock()
        self._valid_until = 0.0
        self._reason: str | None = None

    async def reason_against(self) -> str | None:
        """Why completions cannot be served, or None if they can."""
        async with self._probing:
            loop = asyncio.get_running_loop()
            if loop.time() >= self._valid_until:
                self._reason = await self._probe()
                self._valid_until = loop.time() + _REMEMBER_SECONDS
            return self._reason

    async def _probe(self) -> str | None:
        registrations: list[WorkerRegistration] = []
        for queue in self._queues:
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    workers = await queue.workers()
            except PASSING_ERRORS:
                return f"redis of the {queue.name} queue does not answer"
            except MessageError as error:
                return f"a {queue.name} worker is of another version: {error}"
            if not workers:
                return f"no {queue.name} worker is alive"
            registrations += workers
        return disagreement(registrations)


def disagreement(registrations: Sequence[WorkerRegistration]) -> str | None:
    """Name two workers that differ in their model or in the layout of its state, if there are any.

    Their states would decode to garbage, or be refused one by one.
    """
    first = registrations[0]
    for other in registrations[1:]:
        for what in ("fingerprint", "layout"):
            mine, theirs = getattr(first, what), getattr(other, what)
            if mine != theirs:
                return (
                    f"workers differ in {what}: {first.worker_id} has {mine}, "
                    f"{other.worker_id} has {theirs}"
                )
    return None
