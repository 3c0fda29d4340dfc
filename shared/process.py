"""How every service runs as a process: its event loop, its name, and the signals that end it."""

import asyncio
import errno
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn

import uvloop

from shared.errors import (
    CheckpointError,
    IncompatibleWorkerError,
    UnsupportedDeviceError,
    first_error,
)
from shared.settings import SettingsT, load_settings

_SETTINGS_ERRORS: Final = (
    CheckpointError,
    IncompatibleWorkerError,
    UnsupportedDeviceError,
    socket.gaierror,
)
_ADDRESS_ERRORS: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)


def new_identity(service: str) -> str:
    """A name that no other process has or had."""
    return f"{service}-{secrets.token_hex(6)}"


def run_service(
    program: str,
    settings_type: type[SettingsT],
    serve: Callable[[SettingsT, asyncio.Event], Coroutine[Any, Any, None]],
) -> None:
    """Run a service until SIGTERM or SIGINT; the second signal ends it at once.

    `serve` is given the settings and an event that is set when it has to come to its end.

    A service that cannot start because of its settings or files ends with status 2, as for a wrong
    flag: starting it again would not help.
    """
    settings = load_settings(settings_type, program)
    try:
        _run(_until_signal(settings, serve))
    except _SETTINGS_ERRORS as error:
        _refuse_to_start(program, error)
    except OSError as error:
        if error.errno not in _ADDRESS_ERRORS:
            raise
        _refuse_to_start(program, error)


def _run(service: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(service)
        except BaseExceptionGroup as group:
            raise first_error(group) from group


def _refuse_to_start(program: str, error: Exception) -> NoReturn:
    print(f"{program}: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


async def _until_signal(
    settings: SettingsT, serve: Callable[[SettingsT, asyncio.Event], Coroutine[Any, Any, None]]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await serve(settings, stop)
