"""Settings: flags over environment over defaults, and every mistake named in one line."""

from pathlib import Path

import pytest

from shared.settings import (
    GatewaySettings,
    KvStoreSettings,
    PrefillWorkerSettings,
    load_settings,
)


def test_flags_win_over_the_environment_and_that_over_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRFAAS_PORT", "9000")
    monkeypatch.setenv("PRFAAS_SWEEP_INTERVAL", "5")
    settings = load_settings(KvStoreSettings, "test", ["--port", "9100"])
    assert (settings.port, settings.sweep_interval, settings.host) == (9100, 5, "127.0.0.1")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "70000"], "--port: Input should be less than 65536"),
        (["--sweep-interval", "0"], "--sweep-interval: Input should be greater than 0"),
        (["--redis-url", "http://:secret@host"], "--redis-url: Value error, is not a redis://"),
        (["--redis-url", "redis://:secret@host:port"], "--redis-url: Value error, is not a redis"),
        (["--no-such-flag", "1"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_a_wrong_setting_is_named_without_its_value(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_settings(KvStoreSettings, "test", arguments)
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert complaint in message
    assert "secret" not in message


def test_a_missing_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(GatewaySettings, "test", [])
    assert "--model" in capsys.readouterr().err


def test_a_variable_that_is_no_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRFAAS_REDIS_ULR", "redis://typo")
    with pytest.raises(SystemExit, match="PRFAAS_REDIS_ULR"):
        load_settings(KvStoreSettings, "test", [])


def test_passwords_are_not_shown_with_the_settings() -> None:
    settings = load_settings(KvStoreSettings, "test", ["--redis-url", "redis://:secret@host"])
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({"HOME": "/home/me", "XDG_CACHE_HOME": ""}, Path("/home/me/.cache/prfaas")),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/fast"}, Path("/fast/prfaas")),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "not/absolute"}, Path("/home/me/.cache/prfaas")),
        ({"HOME": "/home/me", "PRFAAS_CACHE": "/volume"}, Path("/volume")),
        ({"HOME": "nowhere", "XDG_CACHE_HOME": ""}, None),
    ],
)
def test_the_cache_is_where_this_user_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], cache: Path | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(PrefillWorkerSettings, "test", ["--model", "model"])
    assert settings.cache == cache
