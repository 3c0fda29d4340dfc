"""deploy/compose.wan.yml: the regions meet over a link that is as slow as one says."""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.compose.conftest import Composed, brought_up
from tests.system.conftest import free_port

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

PROMPT = "a prompt that is long enough to make its state weigh something " * 30


class Control:
    """The link's control, as it is published on this host."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/link"

    def ask(self, method: str = "GET", path: str = "", **settings: Any) -> dict[str, Any]:
        body = json.dumps(settings).encode() if settings else None
        request = urllib.request.Request(self._url + path, data=body, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def carried(self) -> int:
        """Bytes that have come from the prefill region."""
        carried: int = self.ask()["counters"]["bytes_to_client"]
        return carried


@pytest.fixture(scope="module")
def control_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def composed(control_port: int) -> Iterator[Composed]:
    variables = {"PRFAAS_WAN_CONTROL_PORT": str(control_port), "PRFAAS_WAN_BANDWIDTH": "100M"}
    with brought_up("prfaas-test-wan", "deploy/compose.wan.yml", **variables) as system:
        yield system


@pytest.fixture
def control(composed: Composed, control_port: int) -> Control:
    return Control(control_port)


def test_the_link_starts_with_what_the_variables_say(control: Control) -> None:
    settings = control.ask()["settings"]
    assert (settings["bandwidth"], settings["round_trip"]) == (100e6, 0.04)


def test_a_state_crosses_the_link(composed: Composed, control: Control) -> None:
    before = control.carried()
    chunks = composed.stream(PROMPT)
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) == 12
    state = chunks[-1]["timings"]["state_wire_bytes"]
    assert state > 100_000
    assert control.carried() - before >= state


def test_the_text_does_not_depend_on_the_link(composed: Composed, control: Control) -> None:
    before = composed.token_ids()
    control.ask("PATCH", bandwidth="5M", round_trip="150ms", jitter="20ms")
    assert composed.token_ids() == before
    control.ask("PATCH", bandwidth="100M", round_trip="40ms", jitter=0)


def test_requests_survive_a_reset_of_the_link(composed: Composed, control: Control) -> None:
    before = composed.token_ids()
    control.ask("POST", "/reset")
    assert composed.token_ids() == before


def test_the_prefill_region_is_reached_over_the_link_only(composed: Composed) -> None:
    assert composed.networks("prefill-valkey") == {"prefill"}
    assert composed.networks("wan-link") == {"prefill", "wan", "wan-control"}
    address = composed.address("prefill-valkey", "prefill")
    assert composed.reaches("prefill-worker", address, 6379)
    for service in ("decode-worker", "gateway"):
        assert composed.reaches(service, "wan-link", 6379)
        assert not composed.reaches(service, address, 6379)
        assert not composed.reaches(service, "prefill-valkey", 6379), "not by name either"


def test_the_link_runs_without_privileges(composed: Composed) -> None:
    write = "import os; assert os.getuid() != 0; open('/opt/prfaas/file', 'w')"
    result = composed.python("wan-link", write)
    assert result.returncode != 0
    assert "Read-only file system" in result.stderr
    assert composed.inspect("wan-link")["HostConfig"]["CapDrop"] == ["ALL"]
