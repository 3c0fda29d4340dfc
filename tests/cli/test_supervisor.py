import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.cli.errors import CommandError
from services.cli.restart_policy import RestartPolicy
from services.cli.supervisor import Program, Supervisor, supervision
from tests.polling import eventually

pytestmark = pytest.mark.asyncio

HASTY = RestartPolicy(first_pause=0.01, longest_pause=0.01, most_deaths=3)

SERVES = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("asked to stop", flush=True)))
print("up", os.getpid(), flush=True)
while True: signal.pause()
"""
IS_STUBBORN = """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
print("up", os.getpid(), flush=True)
while True: signal.pause()
"""
LEAVES_AN_ORPHAN = """
import subprocess, sys
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
"""
DIES = "import sys; print('last words'); sys.exit(int(sys.argv[1]))"


def python(name: str, source: str, *arguments: str, stop_limit: float = 20) -> Program:
    return Program(name, (sys.executable, "-c", source, *arguments), stop_limit=stop_limit)


async def pid_of(supervisor: Supervisor, name: str, start: int = 1) -> int:
    """Wait until a program has said that it is up, for the so many-th time; gives its pid."""

    def ups() -> list[str]:
        return [line for line in supervisor.last_lines(name) if line.startswith("up ")]

    await eventually(lambda: len(ups()) >= start)
    return int(ups()[start - 1].removeprefix("up "))


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def failure_of(*programs: Program, policy: RestartPolicy = HASTY) -> str:
    """Run programs, one upon the other, until one of them is given up; tells what is said of it."""
    with pytest.raises(ExceptionGroup) as raised:
        await run_for_ever(*programs, policy=policy)
    error: BaseException = raised.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, CommandError)
    return str(error)


async def run_for_ever(*programs: Program, policy: RestartPolicy = HASTY) -> None:
    async with supervision(policy=policy) as supervisor, AsyncExitStack() as running:
        for program in programs:
            await running.enter_async_context(supervisor.running(program))
        await asyncio.Event().wait()


async def test_programs_run_during_the_block_and_are_asked_to_stop_after_it() -> None:
    async with supervision() as supervisor:
        async with supervisor.running(python("service", SERVES)):
            pid = await pid_of(supervisor, "service")
            assert not is_gone(pid)
        assert is_gone(pid)
        assert supervisor.last_lines("service")[-1] == "asked to stop"


async def test_each_program_is_announced_with_its_pid(capfd: pytest.CaptureFixture[str]) -> None:
    async with supervision() as supervisor, supervisor.running(python("service", SERVES)):
        pid = await pid_of(supervisor, "service")
    output = capfd.readouterr()
    assert output.out.split() == ["service", "pid", str(pid)]
    assert output.err.splitlines() == [f"service | up {pid}", "service | asked to stop"]


async def test_output_goes_straight_through_when_it_is_not_relayed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started = tmp_path / "started"
    program = python("service", f"print('mine', flush=True); open({str(started)!r}, 'w')\n{SERVES}")
    async with supervision(relay_logs=False) as supervisor, supervisor.running(program):
        await eventually(started.exists)
    assert capfd.readouterr().err.splitlines()[0] == "mine"


async def test_a_program_that_is_killed_is_started_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = python("service", SERVES)
    async with supervision(policy=HASTY) as supervisor, supervisor.running(program):
        first = await pid_of(supervisor, "service")
        os.kill(first, signal.SIGKILL)
        second = await pid_of(supervisor, "service", start=2)
        assert is_gone(first)
        assert second != first
    assert is_gone(second)
    assert "service was ended by SIGKILL, starts again in 0.01 s" in capfd.readouterr().err


async def test_a_program_that_keeps_dying_is_given_up_with_its_last_words_and_all_stop(
    capfd: pytest.CaptureFixture[str],
) -> None:
    reason = await failure_of(python("healthy", SERVES), python("service", DIES, "1"))
    assert reason.startswith("service ended with status 1 and is given up\nlast words")
    lines = capfd.readouterr().err.splitlines()
    assert lines.count("service | last words") == HASTY.most_deaths
    assert "prfaas: service ended with status 1 and is given up; everything stops" in lines


async def test_the_programs_beside_one_that_is_given_up_are_asked_to_stop(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trigger = tmp_path / "trigger"
    healthy = python("healthy", SERVES.replace("while", f"open({str(trigger)!r}, 'w')\nwhile"))
    dies_after_it = (
        f"import os\nwhile not os.path.exists({str(trigger)!r}): pass\nraise SystemExit(1)"
    )
    await failure_of(healthy, python("service", dies_after_it))
    assert "healthy | asked to stop" in capfd.readouterr().err


async def test_a_program_with_wrong_settings_is_given_up_at_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    reason = await failure_of(python("service", DIES, "2"))
    assert reason.startswith("service ended with status 2")
    assert capfd.readouterr().err.count("service | last words") == 1


async def test_a_program_that_cannot_be_run_is_named() -> None:
    reason = await failure_of(Program("service", ("/nonexistent/program",)))
    assert reason == "cannot run /nonexistent/program: No such file or directory"


async def test_programs_stop_in_the_reverse_order_of_their_start(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with (
        supervision() as supervisor,
        supervisor.running(python("below", SERVES)),
        supervisor.running(python("above", SERVES)),
    ):
        await pid_of(supervisor, "below")
        await pid_of(supervisor, "above")
    stops = [line for line in capfd.readouterr().err.splitlines() if "asked" in line]
    assert stops == ["above | asked to stop", "below | asked to stop"]


async def test_a_program_that_does_not_stop_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    stubborn = python("service", IS_STUBBORN, stop_limit=0.1)
    async with supervision() as supervisor, supervisor.running(stubborn):
        pid = await pid_of(supervisor, "service")
    assert is_gone(pid)
    assert "service did not stop within 0.1 s and was killed" in capfd.readouterr().err


async def test_a_second_cancellation_kills_everything_at_once() -> None:
    supervisors: list[Supervisor] = []

    async def run() -> None:
        async with (
            supervision() as supervisor,
            supervisor.running(python("below", IS_STUBBORN, stop_limit=600)),
            supervisor.running(python("above", IS_STUBBORN, stop_limit=600)),
        ):
            supervisors.append(supervisor)
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await eventually(lambda: bool(supervisors))
    pids = [await pid_of(supervisors[0], name) for name in ("below", "above")]
    task.cancel()
    await eventually(lambda: supervisors[0].last_lines("above")[-1] == "asked to stop")
    task.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait([task])
    assert task.cancelled()
    assert all(map(is_gone, pids))


async def test_what_a_program_leaves_running_with_its_log_open_delays_no_stop() -> None:
    program = python("service", f"{LEAVES_AN_ORPHAN}\n{SERVES}")
    async with asyncio.timeout(20), supervision() as supervisor, supervisor.running(program):
        pid = await pid_of(supervisor, "service")
        orphan = int(supervisor.last_lines("service")[0])
    assert is_gone(pid)
    os.kill(orphan, signal.SIGKILL)
