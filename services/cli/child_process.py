"""Child processes that do not outlive this one, and how they are stopped."""

import asyncio
import ctypes
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from services.cli.errors import CommandError

OWN_GROUP: Final = 0
"""Makes a child the leader of a process group of its own."""

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_PARENT_GONE_STATUS: Final = 1
_KILL_SECONDS: Final = 5.0

# Loaded before any fork: little is safe between fork and exec.
_libc: Final = ctypes.CDLL(None) if sys.platform == "linux" else None


async def start_child(
    command: Sequence[str],
    *,
    output: int,
    environment: Mapping[str, str] | None = None,
    group: int = OWN_GROUP,
) -> Process:
    """Start a program without input that dies with the thread that starts it.

    It is in another process group than this process, so that Ctrl-C in the terminal reaches only
    this one, which then stops its children in order.

    Args:
        command: the program and its arguments.
        output: file descriptor that takes its standard output and error.
        environment: its variables; those of this process if None.
        group: the process group to join.

    Raises:
        CommandError: the program cannot be run.
    """
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            preexec_fn=_tie_to(os.getpid(), group),
        )
    except OSError as error:
        raise CommandError(f"cannot run {command[0]}: {error.strerror}") from None


async def stop_children(processes: Sequence[Process], limit: float) -> list[Process]:
    """End processes with SIGTERM, and after `limit` seconds with SIGKILL.

    When it is cancelled it kills at once. Whatever happens, none of them lives on.

    Returns:
        Those that had to be killed.
    """
    for process in processes:
        _send(process, signal.SIGTERM)
    late: list[Process] = []
    try:
        async with asyncio.timeout(limit):
            await asyncio.gather(*(process.wait() for process in processes))
    except TimeoutError:
        late = [process for process in processes if process.returncode is None]
    finally:
        await kill_children(processes)
    return late


async def kill_children(processes: Sequence[Process]) -> None:
    """End processes with SIGKILL, now."""
    for process in processes:
        _send(process, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(_KILL_SECONDS):
            await asyncio.gather(*(process.wait() for process in processes))


def describe_end(exit_status: int) -> str:
    """Say how a process ended, as `returncode` has it."""
    if exit_status >= 0:
        return f"ended with status {exit_status}"
    try:
        name = signal.Signals(-exit_status).name
    except ValueError:
        name = f"signal {-exit_status}"
    return f"was ended by {name}"


def _send(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def _tie_to(parent: int, group: int) -> Callable[[], None]:
    """What a child does between fork and exec.

    On Linux the kernel kills it as soon as its parent's thread ends, however that happens. macOS
    has nothing like it: there the janitor of the workspace kills the process group.
    """

    def tie() -> None:
        with suppress(OSError):  # the group is gone if the janitor is
            os.setpgid(0, group)
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was told
            os._exit(_PARENT_GONE_STATUS)

    return tie
