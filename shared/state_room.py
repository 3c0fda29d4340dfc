"""Waits for room in an engine: requests get their states in the order in which they asked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.errors import GenerationError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState


class StateRoom:
    """The room of one engine, for the tasks of one event loop.

    Attributes:
        engine: that computes on the states.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        loop = asyncio.get_running_loop()
        engine.watch_room(lambda: loop.call_soon_threadsafe(self._freed.set))

    @asynccontextmanager
    async def state(self, tokens: int) -> AsyncIterator[RequestState]:
        """A new state with room for so many tokens, once there is room; released at the end.

        Who asked first is served first, so that a long request is not passed over for ever.

        Raises:
            GenerationError: the engine never has that much room.
        """
        if tokens > self.engine.capacity:
            raise GenerationError(
                f"the request needs room for {tokens} tokens, this worker has "
                f"{self.engine.capacity} in all (state-tokens)"
            )
        async with self._turn:
            while not self.engine.has_room(tokens):
                self._freed.clear()
                await self._freed.wait()
            state = self.engine.new_state(tokens)
        with state:
            yield state
