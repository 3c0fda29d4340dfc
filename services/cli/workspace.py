"""A temporary directory and a process group that vanish with this process, however it ends."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_JANITOR_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where a running system keeps its files, and the process group of its children."""

    directory: Path
    process_group: int


@contextmanager
def temporary_workspace() -> Iterator[Workspace]:
    """Make a workspace for the block; a janitor process clears it when this process is gone."""
    # A short name: the path of a unix socket in it may have 103 bytes on macOS.
    directory = tempfile.mkdtemp(prefix="prfaas-")
    janitor = subprocess.Popen(  # noqa: S603 - our own module
        module_command("services.cli.janitor", directory),
        stdin=subprocess.PIPE,
        process_group=0,
    )
    try:
        yield Workspace(Path(directory), janitor.pid)
    finally:
        with suppress(subprocess.TimeoutExpired):
            janitor.communicate(timeout=_JANITOR_SECONDS)
        shutil.rmtree(directory, ignore_errors=True)  # in case somebody killed the janitor


def module_command(module: str, *arguments: str) -> list[str]:
    """Give the command that runs a module of ours, not one of that name in the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]
