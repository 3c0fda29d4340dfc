"""Programs that are measured, or needed for it, each in a process of its own."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_LINES_OF_AN_ERROR: Final = 3


class ProgramError(Exception):
    """A program is missing, failed, or printed something else than was asked for."""


def output(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end; gives what it printed.

    Args:
        command: the program and its arguments.
        environment: added to this process's.

    Raises:
        ProgramError: it is missing, or ended badly; says how, with the last lines of its errors.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError:
        raise ProgramError(f"{name} is not there") from None
    if done.returncode != 0:
        last_lines = " | ".join(done.stderr.strip().splitlines()[-_LINES_OF_AN_ERROR:])
        raise ProgramError(f"{name} ended with {_status(done.returncode)}: {last_lines}")
    return done.stdout


def _status(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"status {returncode}"
