"""TLS in front of a server that has none: a certificate of our own, and a forwarder."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """Self-signed, for 127.0.0.1."""

    file: Path
    key: Path


def make_certificate(directory: Path) -> Certificate:
    """Have OpenSSL make one."""
    certificate = Certificate(directory / "certificate.pem", directory / "key.pem")
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-out", str(certificate.file), "-keyout", str(certificate.key)]
    subprocess.run(["openssl", *request.split(), *names, *files], check=True, capture_output=True)
    return certificate


@asynccontextmanager
async def tls_forwarder(socket: str, certificate: Certificate) -> AsyncIterator[int]:
    """Forward TLS connections to a unix socket while the block runs; gives the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key)
    ends: list[asyncio.StreamWriter] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(socket)
        ends.extend((writer, inner_writer))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_pump(reader, inner_writer))
            tasks.create_task(_pump(inner_reader, writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for end in ends:
            end.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(2**16):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    finally:
        sink.transport.abort()
