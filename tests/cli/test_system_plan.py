from pathlib import Path

import pytest

from services.cli.supervisor import Program
from services.cli.system_plan import SystemPlan, SystemPlanner
from shared.settings import (
    SERVICE_SETTINGS,
    DecodeWorkerSettings,
    GatewaySettings,
    KvStoreSettings,
    PrefillWorkerSettings,
    SettingsT,
    UpSettings,
    load_settings,
)

MODEL = Path("/models/tiny")
REDIS_URL = "redis://:secret@localhost/0"


def plan(*flags: str) -> SystemPlan:
    settings = load_settings(UpSettings, "prfaas up", list(flags))
    environment = {
        "PATH": "/bin",
        "prfaas_redis_url": "redis://elsewhere",
        "PRFAAS_PREFILL_REDIS_URL": "redis://elsewhere",
    }
    planner = SystemPlanner(settings, MODEL, environment, REDIS_URL)
    return planner.plan(8000, range(9000, 9000 + planner.ports_needed))


def settings_of(
    program: Program, settings_type: type[SettingsT], monkeypatch: pytest.MonkeyPatch
) -> SettingsT:
    """Read a program's command line and environment as the service itself will."""
    for name, value in (program.environment or {}).items():
        monkeypatch.setenv(name, value)
    module_at = program.command.index("-m")
    return load_settings(settings_type, "test", list(program.command[module_at + 2 :]))


def test_services_understand_their_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    system = plan(
        "--device=cuda",
        "--dtype=bfloat16",
        "--state-tokens=4096",
        "--threads=2",
        "--log-format=json",
        "--host=::",
        "--drain-timeout=5",
    )
    prefill, decode = system.workers
    gateway_settings = settings_of(system.gateway, GatewaySettings, monkeypatch)
    prefill_settings = settings_of(prefill, PrefillWorkerSettings, monkeypatch)
    decode_settings = settings_of(decode, DecodeWorkerSettings, monkeypatch)
    kv_store_settings = settings_of(system.kv_store, KvStoreSettings, monkeypatch)

    assert (gateway_settings.host, gateway_settings.port) == ("::", 8000)
    assert gateway_settings.model == prefill_settings.model == decode_settings.model == MODEL
    assert prefill_settings.device == decode_settings.device == "cuda"
    assert prefill_settings.dtype == decode_settings.dtype == "bfloat16"
    assert prefill_settings.state_tokens == decode_settings.state_tokens == 4096
    assert prefill_settings.threads == decode_settings.threads == 2
    assert gateway_settings.drain_timeout == prefill_settings.drain_timeout == 5
    ports = {prefill_settings.health_port, decode_settings.health_port, kv_store_settings.port}
    assert ports == {9000, 9001, 9002}
    for settings in (gateway_settings, prefill_settings, decode_settings, kv_store_settings):
        assert settings.redis_url == REDIS_URL
        assert settings.log_format == "json"


def test_both_regions_use_the_same_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    system = plan()
    decode_settings = settings_of(system.workers[1], DecodeWorkerSettings, monkeypatch)
    assert decode_settings.prefill_redis_url is None
    assert decode_settings.redis_url == REDIS_URL


def test_passwords_are_not_on_command_lines() -> None:
    programs = [program for tier in plan().tiers for program in tier]
    assert not any("secret" in argument for program in programs for argument in program.command)
    assert not any("secret" in repr(program) for program in programs)


def test_workers_are_numbered_if_there_are_several() -> None:
    system = plan("--prefill-workers=2", "--decode-workers=1")
    names = [worker.name for worker in system.workers]
    assert names == ["prefill_worker-1", "prefill_worker-2", "decode_worker"]
    urls = {worker.url for worker in system.workers}
    assert len(urls) == 3


def test_the_gateway_starts_last_and_stops_first() -> None:
    tiers = [[program.name for program in tier] for tier in plan().tiers]
    assert tiers == [["kv_store"], ["prefill_worker", "decode_worker"], ["gateway"]]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("gateway.example", "http://gateway.example:8000"),
    ],
)
def test_the_gateways_url_is_one_that_this_machine_can_reach(host: str, url: str) -> None:
    assert plan(f"--host={host}").gateway.url == url


def test_a_service_has_time_to_drain_before_it_is_killed() -> None:
    assert plan("--drain-timeout=7").gateway.stop_limit > 7


def test_settings_of_the_whole_system_are_known_variables() -> None:
    assert UpSettings in SERVICE_SETTINGS
