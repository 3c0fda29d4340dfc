"""The endpoints that show and change a link."""

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from services.cli import wan
from services.cli.link.control import control_application
from services.cli.link.schedule import LinkSettings
from services.cli.link.wan_link import WanLink
from shared.observability.health import listening

pytestmark = pytest.mark.asyncio

SETTINGS = LinkSettings(bandwidth=200e6, round_trip=0.04)


@dataclass
class Controlled:
    """A link, and its control as a client reaches it."""

    link: WanLink
    url: str
    session: aiohttp.ClientSession

    async def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        async with self.session.request(method, self.url + path, data=body) as response:
            return response.status, await response.json()

    async def change(self, **settings: Any) -> tuple[int, Any]:
        return await self.ask("PATCH", "/v1/link", json.dumps(settings))


@pytest_asyncio.fixture
async def controlled() -> AsyncIterator[Controlled]:
    with socket.create_server(("127.0.0.1", 0)) as target:
        async with (
            WanLink(target.getsockname(), SETTINGS) as link,
            listening(control_application(link), "127.0.0.1", 0) as url,
            aiohttp.ClientSession() as session,
        ):
            yield Controlled(link, url, session)


async def test_it_shows_settings_and_counters(controlled: Controlled) -> None:
    status, state = await controlled.ask("GET", "/v1/link")
    assert status == 200
    assert state == {
        "settings": {"bandwidth": 200e6, "round_trip": 0.04, "jitter": 0, "corruption": 0},
        "counters": {
            "bytes_to_target": 0,
            "bytes_to_client": 0,
            "held_bytes": 0,
            "open_connections": 0,
        },
        "stalled": False,
    }


async def test_it_changes_what_is_named_and_nothing_else(controlled: Controlled) -> None:
    status, state = await controlled.change(bandwidth="1.5G", jitter=0.001)
    assert status == 200
    changed = LinkSettings(bandwidth=1.5e9, round_trip=0.04, jitter=0.001)
    assert controlled.link.settings == changed
    assert state["settings"]["bandwidth"] == 1.5e9


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"bandwidth": "200MB"}, "bandwidth"),
        ({"bandwidth": -1}, "bandwidth"),
        ({"bandwidth": True}, "bandwidth"),
        ({"bandwidth": None}, "bandwidth"),
        ({"round_trip": "40min"}, "round_trip"),
        ({"jitter": float("nan")}, "jitter"),
        ({"jitter": 1e999}, "jitter"),
        ({"corruption": 1.1}, "corruption"),
        ({"bandwidth": "1G", "latency": 1}, "latency"),
    ],
)
async def test_a_wrong_setting_is_named_and_changes_nothing(
    controlled: Controlled, settings: dict[str, Any], field: str
) -> None:
    status, answer = await controlled.change(**settings)
    assert status == 400
    assert answer["field"] == field
    assert field in answer["error"]
    assert controlled.link.settings == SETTINGS


@pytest.mark.parametrize("body", ["", "nonsense", "[]", '"bandwidth"', "[" * 10_000])
async def test_a_body_that_is_no_object_is_refused(controlled: Controlled, body: str) -> None:
    status, answer = await controlled.ask("PATCH", "/v1/link", body)
    assert status == 400
    assert answer["error"].startswith("the body")


async def test_it_stalls_resumes_and_resets(controlled: Controlled) -> None:
    assert (await controlled.ask("POST", "/v1/link/stall"))[1]["stalled"]
    assert controlled.link.is_stalled
    assert not (await controlled.ask("POST", "/v1/link/resume"))[1]["stalled"]
    assert not controlled.link.is_stalled
    reader, writer = await asyncio.open_connection("127.0.0.1", controlled.link.port)
    await controlled.ask("POST", "/v1/link/reset")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.transport.abort()


async def test_it_has_health_and_metrics(controlled: Controlled) -> None:
    assert await controlled.ask("GET", "/health") == (200, {"status": "ok"})
    async with controlled.session.get(f"{controlled.url}/metrics") as response:
        assert 'prfaas_wan_bytes_total{to="client"} 0.0' in await response.text()


async def test_the_command_runs_a_link_until_it_is_told_to_stop() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", "wan"),
            *("--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"),
            *("--target", f"127.0.0.1:{target.getsockname()[1]}", "--bandwidth", "50Mbps"),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            url = (await process.stdout.readline()).decode().removeprefix("control: ").strip()
            assert (await process.stdout.readline()).startswith(b"link: 127.0.0.1:")
            async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/link") as answer:
                settings = (await answer.json())["settings"]
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    assert (settings["bandwidth"], settings["round_trip"]) == (50e6, 0.04)


@pytest.mark.parametrize("flag", ["--listen", "--control"])
async def test_the_command_says_that_an_address_is_taken(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host, port = taken.getsockname()
        settings = {"--listen": "127.0.0.1:0", "--target": "127.0.0.1:1"}
        words = [word for pair in (settings | {flag: f"{host}:{port}"}).items() for word in pair]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", "wan", *words), stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(30):
            _, complaint = await process.communicate()
    assert process.returncode == 1
    (line,) = complaint.decode().splitlines()
    assert line.startswith("prfaas: cannot listen: ")
    assert str(port) in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--bandwidth", "200MB"),
        ("--round-trip", "1h"),
        ("--jitter", "-1ms"),
        ("--listen", "6379"),
        ("--target", "host:port"),
        ("--corruption", "2"),
    ],
)
async def test_a_wrong_flag_of_the_command_is_named(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"--listen": "127.0.0.1:0", "--target": "127.0.0.1:1"}
    words = [word for pair in ({**right, flag: value}).items() for word in pair]
    with pytest.raises(SystemExit) as exit_:
        wan.run(words)
    assert exit_.value.code == 2
    assert flag in capsys.readouterr().err
