"""Cancels the jobs of requests that nobody waits for any more, also across outages of Redis."""

import asyncio
from typing import Final

import structlog

from shared.streams.connection import PASSING_ERRORS
from shared.streams.job_queue import JobQueue

log = structlog.get_logger()

_PAUSES: Final = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds between attempts. A job that nobody could cancel ends by its `max_tokens`."""


class Cancellations:
    """Those under way; owned here and not by the requests, which may be cancelled themselves."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, queue: JobQueue, request_id: str) -> None:
        """Cancel a job, without waiting for it."""
        task = asyncio.create_task(_cancel(queue, request_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self, patience: float) -> None:
        """Wait for those under way, and give up the rest."""
        if not self._tasks:
            return
        _, unfinished = await asyncio.wait(self._tasks, timeout=patience)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)


async def _cancel(queue: JobQueue, request_id: str) -> None:
    for pause in _PAUSES:
        try:
            await queue.cancel(request_id)
        except PASSING_ERRORS:
            await asyncio.sleep(pause)
        else:
            return
    log.warning("job not cancelled", request=request_id, queue=queue.name)
