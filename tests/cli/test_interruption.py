"""What Ctrl-C, SIGTERM and a closed terminal do to a command, in a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

COMMAND = """
import asyncio, signal
from services.cli.interruption import run_until_signal

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # What runs the tests may ignore it, as nohup does.

async def work():
    try:
        print("working", flush=True)
        await asyncio.Event().wait()
    finally:
        try:
            print("unwinding", flush=True)
            await asyncio.Event().wait() if {hangs} else None
        finally:
            print("unwound", flush=True)

print(run_until_signal(work()))
"""


@contextmanager
def running(*, hangs: bool) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(hangs=hangs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_the_work(number: signal.Signals) -> None:
    with running(hangs=False) as process:
        assert next_line(process) == "working"
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert output.split() == ["unwinding", "unwound", "True"]
    assert errors == "prfaas: stopping; once more stops at once\n"
    assert process.returncode == 0


def test_a_second_signal_cuts_the_unwinding_short() -> None:
    with running(hangs=True) as process:
        assert next_line(process) == "working"
        process.send_signal(signal.SIGINT)
        assert next_line(process) == "unwinding"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert output.split() == ["unwound", "True"]
    assert process.returncode == 0
