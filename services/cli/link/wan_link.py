"""A link between two regions, in user space: TCP connections that share its bandwidth and delay."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog

from services.cli.link.clock import LinkClock
from services.cli.link.connection import LinkConnection, LinkEnd
from services.cli.link.direction import Direction
from services.cli.link.schedule import LinkSettings

log = structlog.get_logger()

Target = tuple[str, int] | Path
"""Host and port, or the path of a unix socket."""

_CONNECT_SECONDS: Final = 10.0
_MOST_CONNECTIONS: Final = 4096


@dataclass(frozen=True, slots=True)
class LinkCounters:
    """What a link has carried, and what it carries."""

    bytes_to_target: int
    bytes_to_client: int
    held_bytes: int
    """Bytes that are inside the link now."""
    open_connections: int


class WanLink:
    """Listens, and forwards each connection to a target over a link that all of them share.

    Opening a connection takes a round trip, as TCP's handshake does: half of it passes before the
    target sees it, and the other half before bytes of the client leave.

    Args:
        target: where connections go.
        settings: of the link; `settings` may be replaced at any time.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        seed: makes jitter and corruption repeatable, for the same bytes at the same times.
    """

    def __init__(
        self,
        target: Target,
        settings: LinkSettings,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        seed: int = 0,
    ) -> None:
        self.target = target
        self.host = host
        self.port = port
        """The one that is listened on, once the link is entered."""
        self._clock = LinkClock()
        self._to_target = Direction(self._clock, settings, f"{seed} to target")
        self._to_client = Direction(self._clock, settings, f"{seed} to client")
        self._connections: dict[LinkConnection, asyncio.Task[None]] = {}
        self._is_closing = False
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start to listen.

        Raises:
            OSError: it cannot listen there.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self._to_target.close)
            stack.callback(self._to_client.close)
            loop = asyncio.get_running_loop()
            server = await loop.create_server(
                self._new_client, self.host, self.port, start_serving=False
            )
            stack.callback(server.close)
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            stack.callback(self._close)
            await server.start_serving()
            self.port = server.sockets[0].getsockname()[1]
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Reset what is open, and release everything."""
        if isinstance(error, asyncio.CancelledError):  # perhaps the task group's doing
            await self._stack.__aexit__(kind, error, traceback)
        else:  # an error of the block stays as it is, and is not put into a group
            await self._stack.aclose()

    @property
    def settings(self) -> LinkSettings:
        """Of bytes that are not on their way yet; they may be replaced."""
        return self._to_target.settings

    @settings.setter
    def settings(self, settings: LinkSettings) -> None:
        self._to_target.settings = settings
        self._to_client.settings = settings

    @property
    def counters(self) -> LinkCounters:
        """What has been carried, and what is under way."""
        return LinkCounters(
            bytes_to_target=self._to_target.carried_bytes,
            bytes_to_client=self._to_client.carried_bytes,
            held_bytes=self._to_target.held_bytes + self._to_client.held_bytes,
            open_connections=len(self._connections),
        )

    @property
    def is_stalled(self) -> bool:
        """Whether nothing is delivered."""
        return self._clock.is_stopped

    def stall(self) -> None:
        """Deliver nothing until `resume`: what is on its way stays there."""
        self._clock.stop()

    def resume(self) -> None:
        """Go on where `stall` stopped."""
        self._clock.go_on()
        self._to_target.go_on()
        self._to_client.go_on()

    def reset(self) -> None:
        """Abort every connection: both its ends get RST, and what was on its way is lost."""
        for connection, task in self._connections.items():
            connection.reset()
            task.cancel()

    def damage_next(self, larger_than: int) -> None:
        """Change one byte of the next chunk from the target with more bytes than that.

        A chunk is what one read of the socket gives.
        """
        self._to_client.schedule.damage_next(larger_than)

    def _new_client(self) -> LinkEnd:
        return LinkConnection(self._begin).client

    def _begin(self, connection: LinkConnection) -> None:
        connection.join(self._to_target, self._to_client)
        if self._is_closing or len(self._connections) >= _MOST_CONNECTIONS:
            connection.reset()
            connection.close()
            return
        task = self._tasks.create_task(self._carry(connection))
        self._connections[connection] = task
        # Also of a task that is cancelled before it begins.
        task.add_done_callback(lambda _: self._forget(connection))

    def _forget(self, connection: LinkConnection) -> None:
        del self._connections[connection]
        connection.reset()
        connection.close()

    async def _carry(self, connection: LinkConnection) -> None:
        try:
            await self._open(connection)
        except (OSError, TimeoutError) as error:
            log.warning("the target of the link cannot be reached", error=str(error))
            return
        await connection.over.wait()

    async def _open(self, connection: LinkConnection) -> None:
        """Connect to the target as a handshake over the link would."""
        await self._clock.pass_by(self.settings.round_trip / 2)
        async with asyncio.timeout(_CONNECT_SECONDS):
            await self._connect(connection.target)
        connection.to_client.open()
        await self._clock.pass_by(self.settings.round_trip / 2)
        connection.to_target.open()

    async def _connect(self, end: LinkEnd) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(self.target, Path):
            await loop.create_unix_connection(lambda: end, str(self.target))
        else:
            await loop.create_connection(lambda: end, *self.target)

    def _close(self) -> None:
        self._is_closing = True
        self.reset()
