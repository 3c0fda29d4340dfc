"""Real servers for every test: one embedded Valkey a session, and a container where Docker runs."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import cache

import pytest
import pytest_asyncio
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from services.cli.embedded_valkey import embedded_valkey
from shared.cache_directory import user_cache_directory

# The fixture removes its container itself; the reaper would be one more image to pull.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")


@pytest.fixture(scope="session", autouse=True)
def caches_of_the_test_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the developer's own caches alone, but for compiled kernels, which take a minute."""
    own = user_cache_directory()
    with pytest.MonkeyPatch.context() as patch:
        if own is not None and "NUMBA_CACHE_DIR" not in os.environ:
            patch.setenv("NUMBA_CACHE_DIR", str(own / "kernels"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest_asyncio.fixture(scope="session")
async def embedded_url() -> AsyncIterator[str]:
    async with embedded_valkey() as valkey:
        yield valkey.url


@pytest.fixture(scope="session")
def container_url() -> Iterator[str]:
    """Redis in a container of `valkey/valkey:9.1`, published on a port of this host."""
    answering = LogMessageWaitStrategy("Ready to accept connections")
    server = DockerContainer("valkey/valkey:9.1").with_exposed_ports(6379).waiting_for(answering)
    with server as container:
        host, port = container.get_container_host_ip(), container.get_exposed_port(6379)
        yield f"redis://{host}:{port}/0"


@pytest.fixture(params=["embedded", pytest.param("container", marks=pytest.mark.docker)])
def any_server_url(request: pytest.FixtureRequest) -> str:
    """The suite of streams and stores runs against each kind of server."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@cache
def docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_docker = [item for item in items if item.get_closest_marker("docker")]
    if needs_docker and not docker_answers():
        for item in needs_docker:
            item.add_marker(pytest.mark.skip(reason="no Docker engine answers"))
