"""Which ports of this machine are free."""

import socket
from contextlib import ExitStack

from services.cli.errors import CommandError


def free_ports(count: int) -> list[int]:
    """Find different ports of the loopback address that nobody listens on.

    They are free now; that nobody takes them before they are used is likely, not certain.
    """
    with ExitStack() as sockets:
        listeners = [
            sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [listener.getsockname()[1] for listener in listeners]


def check_port(host: str, port: int) -> None:
    """Make sure that a service can listen there, before somebody else answers in its place.

    Raises:
        CommandError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise CommandError(
            f"cannot listen on port {port} of {host}: {error.strerror}; --port takes another"
        ) from None
