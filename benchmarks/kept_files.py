"""Files that take long to make and are kept from one run to the next."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

WORKDIR: Final = Path.home() / ".cache" / "prfaas-benchmarks"
"""Where they are, unless a benchmark is told otherwise."""


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """Give a file or directory, made if it is not there yet.

    It is made under another name and renamed once it is whole: what an interrupted run left behind
    is never taken for it.
    """
    if path.exists():
        return path
    unfinished = path.with_name(f"{path.name}.unfinished")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    make(unfinished)
    return unfinished.rename(path)
