"""Waiting in tests: for a condition and with a limit, never for a time."""

import asyncio
from collections.abc import Awaitable, Callable

PAUSE = 0.01
PATIENCE = 30.0
"""Seconds; a busy machine may stand still for some."""


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], within: float = PATIENCE
) -> None:
    """Return as soon as the condition holds; fail if it does not within so many seconds."""
    async with asyncio.timeout(within):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(PAUSE)
