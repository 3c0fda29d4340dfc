from pathlib import Path

import pytest
from aiohttp import web

from services.cli import checks
from services.cli.checks import Finding, check_gateway, check_model, check_redis, judge_redis
from services.cli.doctor import examine, line_of
from services.cli.free_ports import free_ports
from shared.kimi_linear.presets import write_random_checkpoint
from shared.kimi_linear.tokenizer.byte_level import BYTE_TOKENIZER_FILE
from shared.observability.health import add_health_routes, listening

pytestmark = pytest.mark.asyncio


def unused_url(scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{free_ports(1)[0]}"


async def test_a_line_says_what_was_found_and_how_to_mend_it() -> None:
    assert line_of(Finding("python", "3.11")) == "ok       python          3.11"
    assert (
        line_of(Finding("torch", "not installed", "install it"))
        == "missing  torch           not installed -> install it"
    )
    assert line_of(Finding("docker compose", "not found", "install it", required=False)).startswith(
        "optional docker compose"
    )


async def test_this_installation_is_whole() -> None:
    findings = await examine(None, None, None)
    assert [finding for finding in findings if finding.remedy and finding.required] == []
    assert [finding.name for finding in findings] == [
        "python",
        "torch",
        "environment",
        "valkey",
        "gateway",
        "docker compose",
    ]


async def test_an_unknown_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRFAAS_PORTT", "1")
    finding = checks.check_environment()
    assert finding.remedy
    assert "PRFAAS_PORTT" in finding.found


async def test_a_model_is_read(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny")
    finding = check_model(tmp_path)
    assert finding.remedy is None
    assert finding.found.endswith("8 layers, hidden size 96, with a tokenizer")


async def test_a_model_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny")
    (tmp_path / BYTE_TOKENIZER_FILE).unlink()
    finding = check_model(tmp_path)
    assert "no tokenizer" in finding.found
    assert not finding.required


async def test_a_directory_that_is_no_model_is_missing(tmp_path: Path) -> None:
    finding = check_model(tmp_path)
    assert "config.json" in finding.found
    assert finding.remedy
    assert finding.required


async def test_the_embedded_server_is_a_good_redis(embedded_url: str) -> None:
    assert (await check_redis(embedded_url)).remedy is None


@pytest.mark.parametrize(
    ("version", "policy", "is_good"),
    [
        ("7.2.4", "noeviction", True),
        ("8.0", "noeviction", True),
        ("10.1.0", "noeviction", True),
        ("6.2.14", "noeviction", False),
        ("7.2.4", "allkeys-lru", False),
    ],
)
async def test_a_redis_has_to_be_new_and_to_keep_what_is_written(
    version: str, policy: str, is_good: bool
) -> None:
    assert (judge_redis("redis", version, policy).remedy is None) == is_good


async def test_a_redis_that_does_not_answer_is_missing_and_its_password_not_shown() -> None:
    url = unused_url("redis").replace("//", "//:secret@")
    finding = await check_redis(url)
    assert finding.remedy
    assert "secret" not in line_of(finding)


async def test_a_redis_url_that_is_none_is_said() -> None:
    finding = await check_redis("no-scheme")
    assert finding.remedy == "correct --redis-url"


@pytest.mark.parametrize("reason", [None, "no prefill worker is alive"])
async def test_a_gateway_is_asked_whether_it_is_ready(reason: str | None) -> None:
    async def ready() -> str | None:
        return reason

    application = web.Application()
    add_health_routes(application, ready)
    async with listening(application, "127.0.0.1", 0) as url:
        finding = await check_gateway(url, required=True)
    if reason is None:
        assert finding == Finding("gateway", f"{url} is ready")
    else:
        assert finding.found == f"{url} is not ready: {reason}"
        assert finding.required


@pytest.mark.parametrize("required", [True, False])
async def test_a_gateway_that_nobody_named_need_not_run(required: bool) -> None:
    finding = await check_gateway(unused_url(), required=required)
    assert finding.remedy
    assert finding.required == required
