"""Remembers the names of models between processes: to hash one takes reading all of its weights.

A name is remembered with what the file system says of the files that it was computed from, and is
not believed once any of that differs.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Final, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from shared.errors import CheckpointError
from shared.kimi_linear.config import CONFIG_FILE
from shared.kimi_linear.fingerprint import fingerprint, weight_files
from shared.kimi_linear.read_progress import ReadProgress, unobserved

SETTLED: Final = 2_000_000_000
"""Nanoseconds without a change after which a further one is sure to change a file's times, too."""

LONGEST_RECORD: Final = 1024
"""Bytes."""

Hash = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{32}\z")]


class _Record(BaseModel):
    """A name, and a hash over what the file system said of the files that have it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    files: Hash
    fingerprint: Hash


class FingerprintCache:
    """Names of models, one small file for each model directory.

    A cache that is damaged, or cannot be read or written, costs the time to hash again and nothing
    else. Several processes may use one.

    Args:
        directory: of these files; made when there is something to remember.
        clock: gives nanoseconds since the epoch.
    """

    def __init__(self, directory: Path, clock: Callable[[], int] = time.time_ns) -> None:
        self._directory = directory
        self._clock = clock

    def fingerprint(self, model: str | Path, progress: ReadProgress = unobserved) -> str:
        """As the function of this name, which is called unless the files are as they were then.

        Args:
            model: directory of the model.
            progress: told of what is hashed, if anything is.

        Raises:
            CheckpointError: the directory has no readable configuration or no readable weights.
        """
        root = Path(model).resolve()
        record_path = self._directory / f"{xxhash.xxh3_128_hexdigest(os.fsencode(root))}.json"
        status, now = _model_status(root), self._clock()
        record = _read(record_path)
        if record and record.files == _hash(status):
            return record.fingerprint
        computed = fingerprint(root, progress)
        if _settled(status, now) and _model_status(root) == status:
            with suppress(OSError):
                _write(record_path, _Record(files=_hash(status), fingerprint=computed))
        return computed


# --- what the file system says ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FileStatus:
    """Differs once a file was written or another has taken its place. Times in nanoseconds."""

    name: str
    size: int
    modified: int
    changed: int
    inode: int
    device: int


def _model_status(directory: Path) -> tuple[_FileStatus, ...]:
    paths = [directory / CONFIG_FILE, *weight_files(directory)]
    return tuple(_file_status(path) for path in paths)


def _file_status(path: Path) -> _FileStatus:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    return _FileStatus(
        name=path.name,
        size=found.st_size,
        modified=found.st_mtime_ns,
        changed=found.st_ctime_ns,
        inode=found.st_ino,
        device=found.st_dev,
    )


def _hash(status: tuple[_FileStatus, ...]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([astuple(file) for file in status]).encode())


def _settled(status: tuple[_FileStatus, ...], now: int) -> bool:
    """Whether any change from `now` on will show."""
    return all(max(file.modified, file.changed) + SETTLED <= now for file in status)


# --- records ---------------------------------------------------------------------------------


def _read(path: Path) -> _Record | None:
    try:
        with path.open("rb") as file:
            return _Record.model_validate_json(file.read(LONGEST_RECORD))
    except (OSError, ValidationError):
        return None


def _write(path: Path, record: _Record) -> None:
    """Put a record in the place of the one before, whole, and for this user only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(record.model_dump_json())
            file.close()
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink()
            raise
