"""The `prfaas` command as a process: what a shell sees of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.free_ports import free_ports


def prfaas(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | variables,
    )


def test_help_lists_the_commands() -> None:
    result = prfaas("--help")
    assert result.returncode == 0
    for command in ("up", "complete", "doctor", "init-model", "demo", "wan"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", ["up", "complete", "doctor", "init-model", "demo", "wan"])
def test_each_command_has_its_own_help(command: str) -> None:
    result = prfaas(command, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: prfaas {command} ")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["complete"], ["up", "--port=nonsense"]])
def test_a_wrong_command_line_ends_with_status_2(arguments: list[str]) -> None:
    result = prfaas(*arguments)
    assert result.returncode == 2
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_variable_is_refused() -> None:
    result = prfaas("up", PRFAAS_NONSENSE="1")
    assert result.returncode != 0
    assert "PRFAAS_NONSENSE" in result.stderr


def test_a_failure_is_one_line_and_status_1() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    result = prfaas("complete", "text", "--url", url)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"prfaas: nothing answers at {url}; `prfaas up` starts a system, --url names another"
    ]


def test_a_model_is_written_once(tmp_path: Path) -> None:
    first = prfaas("init-model", str(tmp_path / "model"), "--seed", "5")
    assert first.returncode == 0
    assert (tmp_path / "model" / "config.json").exists()
    second = prfaas("init-model", str(tmp_path / "model"))
    assert second.returncode == 1
    assert "is not empty" in second.stderr


def test_a_system_does_not_start_on_a_model_that_is_none(tmp_path: Path) -> None:
    result = prfaas("up", f"--model={tmp_path}", "--port=0")
    assert result.returncode == 1
    assert "config.json" in result.stderr
    assert result.stdout == ""


def test_a_system_does_not_start_on_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = prfaas("up", f"--port={port}")
    assert result.returncode == 1
    assert f"cannot listen on port {port} of 127.0.0.1" in result.stderr
    assert result.stdout == ""


def test_a_system_does_not_start_on_a_redis_that_does_not_answer(tmp_path: Path) -> None:
    url = f"redis://:secret@127.0.0.1:{free_ports(1)[0]}"
    result = prfaas(
        "up", "--port=0", "--redis-url", url, "--ready-timeout=0.5", TMPDIR=str(tmp_path)
    )
    assert result.returncode == 1
    assert "does not answer within" in result.stderr
    assert "secret" not in result.stderr
    assert list(tmp_path.iterdir()) == []
