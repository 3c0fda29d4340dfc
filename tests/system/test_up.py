"""`prfaas up` as a user runs it: ready, useful, mends itself, and leaves nothing behind."""

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from tests.polling import eventually

pytestmark = pytest.mark.asyncio

PRFAAS = (sys.executable, "-m", "services.cli")


@dataclass
class Up:
    """A running `prfaas up`, and what it has printed."""

    process: Process
    lines: list[str] = field(default_factory=list)

    async def printed(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line; only those after the first `after` lines count."""

        def found() -> re.Match[str] | None:
            matches = (re.search(pattern, line) for line in self.lines[after:])
            return next(filter(None, matches), None)

        await eventually(lambda: found() is not None, within=60)
        match = found()
        assert match is not None
        return match

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().rstrip())

    async def pid_of(self, service: str, after: int = 0) -> int:
        return int((await self.printed(rf"^{service}\s+pid (\d+)", after))[1])


async def command(*arguments: str, temporary: Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *PRFAAS,
        *arguments,
        stdout=PIPE,
        stderr=STDOUT,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t")


@pytest_asyncio.fixture
async def up(temporary: Path) -> AsyncIterator[Up]:
    process = await asyncio.create_subprocess_exec(
        *PRFAAS,
        "up",
        "--port=0",
        stdout=PIPE,
        stderr=STDOUT,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"},
    )
    up = Up(process)
    reading = asyncio.create_task(up.read())
    yield up
    if process.returncode is None:
        process.kill()
        await process.wait()
    await reading


async def test_a_system_is_brought_up_used_mended_and_taken_down(up: Up, temporary: Path) -> None:
    url = (await up.printed(r"^ready: (http://\S+)"))[1]
    services = ("valkey", "kv_store", "prefill_worker", "decode_worker", "gateway")
    pids = [await up.pid_of(service) for service in services]

    status, output = await command(
        "complete", "hello", "--url", url, "--max-tokens", "5", temporary=temporary
    )
    assert status == 0, output
    assert "first token" in output
    assert "on the wire" in output
    status, output = await command("doctor", "--url", url, temporary=temporary)
    assert status == 0, output

    seen = len(up.lines)
    os.kill(pids[3], signal.SIGKILL)
    reborn = await up.pid_of("decode_worker", after=seen)
    assert reborn != pids[3]
    status, output = await command(
        "complete", "again", "--url", url, "--max-tokens", "5", temporary=temporary
    )
    assert status == 0, output

    up.process.send_signal(signal.SIGINT)
    async with asyncio.timeout(60):
        assert await up.process.wait() == 0
    assert not any(map(is_alive, (*pids, reborn)))
    assert os.listdir(temporary) == []


async def test_a_killed_system_leaves_nothing_either(up: Up, temporary: Path) -> None:
    await up.printed(r"^ready: ")
    pids = [await up.pid_of(service) for service in ("valkey", "gateway", "decode_worker")]
    up.process.kill()
    await eventually(lambda: not any(map(is_alive, pids)))
    await eventually(lambda: os.listdir(temporary) == [])
