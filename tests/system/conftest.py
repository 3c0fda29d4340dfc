"""The whole system as a user runs it: one process a service, nothing in common but Redis."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from services.cli.embedded_valkey import embedded_valkey
from shared.kimi_linear.presets import write_random_checkpoint
from tests.polling import eventually

LOG_LINES = 40
"""Of each service, that a failed test shows."""
SERVICES = ("gateway", "kv_store", "serving_kv_store", "prefill_worker", "decode_worker")
CODECS = ("--latent-codec", "zstd", "--state-codec", "zstd")
WORKER_FLAGS = ("--threads", "1", "--heartbeat-ttl", "1.5", "--heartbeat-interval", "0.3")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Show what the services of a failed test have logged last."""
    report: Any = yield
    if report.failed:
        arguments = getattr(item, "funcargs", {}).values()
        systems = {id(value): value for value in arguments if isinstance(value, System)}
        for system in systems.values():
            for service in system.processes:
                lines = system.log(service).splitlines()[-LOG_LINES:]
                report.sections.append((f"log of {service}", "\n".join(lines)))
    return report


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer, shared by all tests."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, "tiny", seed=3)
    return directory


@dataclass(frozen=True)
class RegionUrls:
    """How one service reaches the Redis of each region."""

    serving: str
    prefill: str


@dataclass
class System:
    """Starts, kills and asks the services.

    The services reach Redis as the tests do, but those that have URLs of their own.
    """

    redis_url: str
    prefill_redis_url: str
    model: Path
    logs: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    own_urls: Mapping[str, RegionUrls] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def flags(self, service: str) -> list[str]:
        urls = self.own_urls.get(service, RegionUrls(self.redis_url, self.prefill_redis_url))
        both_regions = ["--redis-url", urls.serving, "--prefill-redis-url", urls.prefill]
        model = ["--model", str(self.model)]
        match service:
            case "gateway":
                return [*both_regions, *model, "--port", str(self.port), "--ping-interval", "1"]
            case "prefill_worker":
                return ["--redis-url", urls.prefill, *model, *WORKER_FLAGS, *CODECS]
            case "decode_worker":
                return [*both_regions, *model, *WORKER_FLAGS, "--stall-timeout", "10"]
            case "serving_kv_store":
                return ["--redis-url", urls.serving, "--port", "0"]
            case _:
                return ["--redis-url", urls.prefill, "--port", "0"]

    async def start(self, *services: str, extra: tuple[str, ...] = ()) -> None:
        for service in services:
            with self._log_path(service).open("wb") as log:
                self.processes[service] = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    f"services.{service.removeprefix('serving_')}",
                    *self.flags(service),
                    *extra,
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )

    async def kill(self, service: str, number: signal.Signals = signal.SIGKILL) -> int:
        process = self.processes.pop(service)
        process.send_signal(number)
        async with asyncio.timeout(30):
            return await process.wait()

    async def ready(self) -> None:
        """Wait until the gateway says that everything a request needs is there."""

        async def answers() -> bool:
            try:
                async with aiohttp.ClientSession() as client, client.get(f"{self.url}/ready") as it:
                    return it.status == 200
            except aiohttp.ClientError:
                return False

        await eventually(answers, within=60)

    async def complete(self, api_key: str | None = None, /, **body: Any) -> dict[str, Any]:
        """One completion that is not streamed."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        async with (
            aiohttp.ClientSession(headers=headers) as client,
            client.post(f"{self.url}/v1/completions", json=body) as response,
        ):
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    def log(self, service: str) -> str:
        """What the service has logged since its latest start."""
        return self._log_path(service).read_text()

    def _log_path(self, service: str) -> Path:
        return self.logs / f"{service}.log"

    async def stop(self) -> None:
        for service in list(self.processes):
            await self.kill(service)


@pytest_asyncio.fixture(scope="session")
async def one_system(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    """Two regions, each with a Redis of its own; started once, for its start takes seconds."""
    async with embedded_valkey() as serving, embedded_valkey() as prefill:
        system = System(serving.url, prefill.url, model, tmp_path_factory.mktemp("logs"))
        try:
            yield system
        finally:
            await system.stop()


@pytest_asyncio.fixture
async def system(one_system: System) -> System:
    """The system with one of each service running and ready, whatever the test before did to it."""
    await one_system.start(*(name for name in SERVICES if name not in one_system.processes))
    await one_system.ready()
    return one_system
