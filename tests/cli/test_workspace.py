import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.workspace import temporary_workspace

OWNER = """
import asyncio, os
from services.cli.child_process import start_child
from services.cli.workspace import temporary_workspace

async def main():
    with temporary_workspace() as workspace:
        (workspace.directory / "file").touch()
        child = await start_child(
            ["sleep", "600"], output=1, group=workspace.process_group
        )
        assert os.getpgid(child.pid) == workspace.process_group != os.getpgid(0)
        print(workspace.directory, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_workspace_vanishes_with_its_block() -> None:
    with temporary_workspace() as workspace:
        (workspace.directory / "folder").mkdir()
        (workspace.directory / "folder" / "file").write_text("content")
        assert os.getpgid(workspace.process_group) == workspace.process_group
    assert not workspace.directory.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(workspace.process_group, 0)


def test_a_workspace_is_removed_even_if_its_janitor_was_killed() -> None:
    with temporary_workspace() as workspace:
        os.kill(workspace.process_group, signal.SIGKILL)
    assert not workspace.directory.exists()


def test_nothing_outlives_an_owner_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().decode().strip())
        assert (directory / "file").exists()
        owner.kill()
        # The child and the janitor hold the pipe as well: it ends when all of them are gone.
        assert owner.stdout.read() == b""
    assert not directory.exists()
