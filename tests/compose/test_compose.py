"""docker-compose.yml as a user runs it: two regions, one network between, nothing left over."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.compose.conftest import Composed, brought_up

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

PROJECT = "prfaas-test"

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


@pytest.fixture(scope="module")
def composed() -> Iterator[Composed]:
    with brought_up(PROJECT) as system:
        yield system


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
    on_wan = {service for service in services if "wan" in composed.networks(service)}
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
