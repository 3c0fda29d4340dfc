"""A whole system as two regions on this machine, with a link of given speed between them."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import Any, Final

import aiohttp

from benchmarks.programs import ProgramError
from services.cli.child_process import start_child, stop_children
from services.cli.embedded_valkey import embedded_valkey
from services.cli.free_ports import free_ports
from services.cli.readiness import wait_until_ready

LOOPBACK: Final = "127.0.0.1"
_READY_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 20.0
_QUIET_SECONDS: Final = 0.5
_QUIET_BYTES: Final = 20_000
_UNIX_URL: Final = "unix://"


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between the regions."""

    bandwidth: float
    """Bits a second in each direction."""
    round_trip: float
    """Seconds."""

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e6:g} Mbps {self.round_trip * 1e3:g} ms"


LINKS: Final = (Link(1e9, 0.010), Link(200e6, 0.040))


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that a service has logged."""

    event: str
    at: float
    """Seconds since 1970."""
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as it came."""

    request_id: str
    arrivals: tuple[float, ...]
    """Of each token, in seconds since 1970."""
    token_ids: tuple[int, ...]
    cached_tokens: int
    timings: dict[str, float]


class TwoRegions:
    """The running system."""

    def __init__(
        self, url: str, control: str, prefill_url: str, linked_url: str, logs: Path
    ) -> None:
        self.url = url
        self.prefill_url = prefill_url
        """The prefill region's Redis, as its own region reaches it."""
        self.linked_url = linked_url
        """The same, as the serving region reaches it: over the link."""
        self._control = control
        self._logs = logs

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Stream the most likely tokens.

        Raises:
            ProgramError: it ended with an error.
        """
        body = {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        arrivals: list[float] = []
        token_ids: list[int] = []
        cached_tokens, timings = 0, dict[str, float]()
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as client,
            client.post(f"{self.url}/v1/completions", json=body) as response,
        ):
            request_id = response.headers["X-Request-Id"]
            async for chunk in _chunks(response.content):
                if "error" in chunk:
                    raise ProgramError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    token_ids += choice["token_ids"]
                    arrivals += [time()] * len(choice["token_ids"])
                timings |= chunk.get("timings") or {}
                if chunk.get("usage"):
                    cached_tokens = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Answer(request_id, tuple(arrivals), tuple(token_ids), cached_tokens, timings)

    async def set_link(self, link: Link) -> None:
        """Change the speed of the link for what is sent from now on."""
        changes = {"bandwidth": link.bandwidth, "round_trip": link.round_trip}
        async with (
            aiohttp.ClientSession() as client,
            client.patch(f"{self._control}/v1/link", json=changes) as response,
        ):
            response.raise_for_status()

    async def carried_bytes(self) -> tuple[int, int]:
        """Bytes that the link has carried so far, to the prefill region and from it."""
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"{self._control}/v1/link") as response,
        ):
            counters = (await response.json())["counters"]
        return counters["bytes_to_target"], counters["bytes_to_client"]

    async def settled(self) -> None:
        """Wait until nothing but signs of life crosses the link."""
        carried = await self.carried_bytes()
        while True:
            await asyncio.sleep(_QUIET_SECONDS)
            before, carried = carried, await self.carried_bytes()
            if sum(carried) - sum(before) < _QUIET_BYTES:
                return

    def log_lines(self, service: str, request_id: str) -> list[LogLine]:
        """What a service has logged of one request."""
        lines = (self._logs / f"{service}.log").read_text().splitlines()
        return [_log_line(json.loads(line)) for line in lines if f'"{request_id}"' in line]


def _log_line(fields: dict[str, Any]) -> LogLine:
    at = datetime.fromisoformat(fields["timestamp"]).timestamp()
    return LogLine(fields["event"], at, fields)


async def _chunks(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    async for line in content:
        data = line.decode().strip().removeprefix("data: ")
        if data.startswith("{"):
            yield json.loads(data)


@asynccontextmanager
async def two_regions(
    model: Path, link: Link, *, prefill_threads: int = 1, prefix_cache: bool = True
) -> AsyncIterator[TwoRegions]:
    """Run a system while the block runs; each service is a process of its own.

    Raises:
        ProgramError: it does not become ready.
    """
    async with AsyncExitStack() as running:
        logs = Path(running.enter_context(TemporaryDirectory(prefix="prfaas-")))
        serving = await running.enter_async_context(embedded_valkey())
        prefill = await running.enter_async_context(embedded_valkey())
        link_port, control_port, gateway_port = free_ports(3)
        regions = TwoRegions(
            url=f"http://{LOOPBACK}:{gateway_port}",
            control=f"http://{LOOPBACK}:{control_port}",
            prefill_url=prefill.url,
            linked_url=f"redis://{LOOPBACK}:{link_port}/0",
            logs=logs,
        )
        both = ("--redis-url", serving.url, "--prefill-redis-url", regions.linked_url)
        worker = ("--model", str(model), "--prefix-cache", str(prefix_cache).lower())
        programs = {
            "wan": _wan(link, link_port, control_port, prefill.url),
            "kv_store": _service("kv_store", "--redis-url", prefill.url, "--port", "0"),
            "serving_kv_store": _service("kv_store", "--redis-url", serving.url, "--port", "0"),
            "prefill_worker": _service(
                "prefill_worker",
                *("--redis-url", prefill.url, "--threads", str(prefill_threads), *worker),
            ),
            "decode_worker": _service("decode_worker", *both, "--threads", "1", *worker),
            "gateway": _service(
                "gateway", *both, "--port", str(gateway_port), "--model", str(model)
            ),
        }
        for name, command in programs.items():
            await running.enter_async_context(_running(command, logs / f"{name}.log"))
        await _wait_until_ready(regions.url)
        yield regions


def _wan(link: Link, port: int, control_port: int, target_url: str) -> list[str]:
    return [
        *(sys.executable, "-m", "services.cli", "wan"),
        *("--listen", f"{LOOPBACK}:{port}", "--control", f"{LOOPBACK}:{control_port}"),
        *("--target", target_url.removeprefix(_UNIX_URL)),
        *("--bandwidth", f"{link.bandwidth:.0f}", "--round-trip", f"{link.round_trip:f}"),
    ]


def _service(module: str, *flags: str) -> list[str]:
    logging = ("--log-format", "json", "--log-level", "debug")
    return [sys.executable, "-m", f"services.{module}", *flags, *logging]


@asynccontextmanager
async def _running(command: Sequence[str], log: Path) -> AsyncIterator[None]:
    with log.open("wb") as output:
        process = await start_child(command, output=output.fileno())
    try:
        yield
    finally:
        await stop_children([process], _STOP_SECONDS)


async def _wait_until_ready(url: str) -> None:
    try:
        async with asyncio.timeout(_READY_SECONDS), aiohttp.ClientSession() as client:
            await wait_until_ready(client, url)
    except TimeoutError:
        raise ProgramError("the system does not become ready") from None


def table_row(name: str, *cells: str) -> str:
    """A line of a table: its name, and cells under each other."""
    return f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells)


def megabytes(amount: float) -> str:
    """Bytes in a table."""
    return f"{amount / 1e6:.1f} MB"


def tokens_of(count: int, seed: int, vocabulary: int) -> Iterator[int]:
    """Tokens that look like nothing, the same for the same seed."""
    state = seed * 2654435761 % 2**32 or 1
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        yield (state >> 8) % vocabulary
