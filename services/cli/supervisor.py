"""Runs programs as child processes, restarts those that die, and stops them in reverse order."""

import asyncio
import os
from asyncio.subprocess import Process
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from services.cli.child_process import (
    OWN_GROUP,
    describe_end,
    kill_children,
    start_child,
    stop_children,
)
from services.cli.console import say, warn
from services.cli.errors import CommandError
from services.cli.log_relay import relay_lines
from services.cli.restart_policy import RestartPolicy

KEPT_LINES: Final = 20
"""Last lines of a program's log that are shown when it fails."""

_STANDARD_ERROR: Final = 2
_RELAY_SECONDS: Final = 1.0
"""How long lines may follow after a process has ended: what it started may hold its pipe open."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, and how."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] | None = field(default=None, repr=False)
    """Its variables, which may hold passwords; those of this process if None."""
    url: str = ""
    """Base of its health endpoints; empty if it has none."""
    stop_limit: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""


@asynccontextmanager
async def supervision(
    *, policy: RestartPolicy | None = None, group: int = OWN_GROUP, relay_logs: bool = True
) -> AsyncIterator["Supervisor"]:
    """Make a supervisor for the block. The block is cancelled when a program has to be given up.

    Args:
        policy: when to start a program again.
        group: the process group that the programs join.
        relay_logs: put each program's name before its lines; otherwise its output goes straight
            to standard error.

    Raises:
        ExceptionGroup: of a CommandError for each program that was given up.
    """
    # While the block and the watchers unwind, the relays go on: a full pipe would stop a program.
    async with asyncio.TaskGroup() as relays, asyncio.TaskGroup() as watchers:
        yield Supervisor(policy or RestartPolicy(), group, relays if relay_logs else None, watchers)


class Supervisor:
    """Keeps programs running."""

    def __init__(
        self,
        policy: RestartPolicy,
        group: int,
        relays: asyncio.TaskGroup | None,
        watchers: asyncio.TaskGroup,
    ) -> None:
        self._policy = policy
        self._group = group
        self._relays = relays
        self._watchers = watchers
        self._children: dict[str, _Child] = {}
        self._hurried = False

    @asynccontextmanager
    async def running(self, *programs: Program) -> AsyncIterator[None]:
        """Keep programs running while the block runs, then stop them together.

        When the stop is cancelled, this and all later ones kill at once.
        """
        children: list[_Child] = []
        watchers: list[asyncio.Task[None]] = []
        try:
            for program in programs:
                child = _Child(program, self._group, self._relays)
                await child.start()
                children.append(child)
                watchers.append(self._watchers.create_task(self._watch(child)))
            self._children |= {child.program.name: child for child in children}
            yield
        finally:
            for watcher in watchers:
                watcher.cancel()
            await self._stop(children)

    def last_lines(self, name: str) -> list[str]:
        """Give the end of a program's log, as far as it was relayed."""
        return list(self._children[name].last_lines)

    async def _watch(self, child: "_Child") -> None:
        deaths: deque[float] = deque(maxlen=self._policy.most_deaths)
        while True:
            exit_status = await child.ended()
            deaths.append(asyncio.get_running_loop().time())
            pause = self._policy.pause_after(deaths, exit_status)
            if pause is None:
                raise _given_up(child, exit_status)
            warn(f"prfaas: {child} {describe_end(exit_status)}, starts again in {pause:g} s")
            await asyncio.sleep(pause)
            await child.start()

    async def _stop(self, children: list["_Child"]) -> None:
        limit = max((child.program.stop_limit for child in children), default=0)
        processes = [child.process for child in children]
        try:
            if self._hurried:
                await kill_children(processes)
            late = await stop_children(processes, limit)
        except asyncio.CancelledError:
            self._hurried = True
            raise
        finally:
            for child in children:
                await child.relayed()
        for child in children:
            if child.process in late:
                warn(f"prfaas: {child} did not stop within {limit:g} s and was killed")


class _Child:
    """A program and the process that runs it now."""

    process: Process

    def __init__(self, program: Program, group: int, relays: asyncio.TaskGroup | None) -> None:
        self.program = program
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._group = group
        self._relays = relays
        self._relay: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return self.program.name

    async def start(self) -> None:
        """Start the process, the first or the next one."""
        if self._relays is None:
            self.process = await self._start_process(_STANDARD_ERROR)
        else:
            read_end, write_end = os.pipe()
            self._relay = self._relays.create_task(relay_lines(read_end, self._take_line))
            try:
                self.process = await self._start_process(write_end)
            finally:
                os.close(write_end)
        say(f"{self!s:<18} pid {self.process.pid:<8} {self.program.url}".rstrip())

    async def ended(self) -> int:
        """Wait until the process has ended and its last lines are passed on; gives its status."""
        exit_status = await self.process.wait()
        await self.relayed()
        return exit_status

    async def relayed(self) -> None:
        """Wait for the last lines of a process that has ended."""
        if self._relay is not None:
            await asyncio.wait([self._relay], timeout=_RELAY_SECONDS)
            self._relay.cancel()

    async def _start_process(self, output: int) -> Process:
        return await start_child(
            self.program.command,
            output=output,
            environment=self.program.environment,
            group=self._group,
        )

    def _take_line(self, line: str) -> None:
        self.last_lines.append(line)
        warn(f"{self} | {line}")


def _given_up(child: _Child, exit_status: int) -> CommandError:
    what = f"{child} {describe_end(exit_status)} and is given up"
    warn(f"prfaas: {what}; everything stops")
    return CommandError("\n".join([what, *child.last_lines]))
