"""A model is hashed once; its name is not believed when anything could have changed since."""

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from shared.errors import CheckpointError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.fingerprint import fingerprint
from shared.kimi_linear.fingerprint_cache import FingerprintCache

WriteCheckpoint = Callable[[dict[str, Tensor], dict[str, Any]], Path]


MINUTE = 60 * 10**9


@dataclass
class Hashing:
    """A cache in `directory`, asked at `now` in nanoseconds, and how often it had to hash."""

    directory: Path
    now: int = field(default_factory=lambda: time.time_ns() + MINUTE)
    count: int = field(default=0, init=False)

    @property
    def cache(self) -> FingerprintCache:
        return FingerprintCache(self.directory, lambda: self.now)

    def name(self, model: Path) -> str:
        return self.cache.fingerprint(model, self._progress)

    def record(self) -> Path:
        (path,) = self.directory.iterdir()
        return path

    def _progress(self, read_bytes: int, total_bytes: int) -> None:
        self.count += read_bytes == 0


@pytest.fixture
def hashing(tmp_path: Path) -> Hashing:
    return Hashing(tmp_path / "cache" / "fingerprints")


@pytest.fixture
def model(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> Path:
    """A model whose files were written an hour ago."""
    directory = write_checkpoint(reference_tensors, reference_config)
    hour_ago = time.time_ns() - 60 * MINUTE
    for path in directory.iterdir():
        os.utime(path, ns=(hour_ago, hour_ago))
    return directory


# --- what is remembered ------------------------------------------------------------------------


def test_a_model_is_hashed_once(hashing: Hashing, model: Path) -> None:
    assert hashing.name(model) == hashing.name(model) == fingerprint(model)
    assert hashing.count == 1


def test_a_model_has_one_name_by_whatever_path(
    hashing: Hashing, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(model)
    hashing.name(model)
    hashing.name(tmp_path / "link")
    monkeypatch.chdir(model)
    hashing.name(Path())
    assert hashing.count == 1


def test_each_model_directory_has_a_record_of_its_own(
    hashing: Hashing, model: Path, reference_directory: Path
) -> None:
    for _ in range(2):
        assert hashing.name(model) == fingerprint(model)
        assert hashing.name(reference_directory) == fingerprint(reference_directory)
    assert hashing.count == 2


def test_a_file_with_any_name_is_remembered(hashing: Hashing, model: Path) -> None:
    os.link(model / "model.safetensors", os.fsencode(model) + b"/\xff.safetensors")
    assert hashing.name(model) == hashing.name(model) == fingerprint(model)
    assert hashing.count == 1


def test_records_are_for_this_user_only_and_leave_nothing_else(
    hashing: Hashing, model: Path
) -> None:
    hashing.name(model)
    assert stat.S_IMODE(hashing.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(hashing.record().stat().st_mode) == 0o600


def test_an_engine_takes_its_name_from_the_cache(hashing: Hashing, model: Path) -> None:
    hashed: list[int] = []
    for _ in range(2):
        engine = Engine.load(
            model,
            "float32",
            cache=hashing.cache,
            hash_progress=lambda read_bytes, _: hashed.append(read_bytes),
        )
        assert engine.fingerprint == fingerprint(model)
    assert hashed.count(0) == 1


# --- what is not believed ----------------------------------------------------------------------


def weights_of(model: Path) -> Path:
    return model / "model.safetensors"


def change_a_byte(model: Path) -> None:
    with weights_of(model).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def change_a_byte_and_set_the_time_back(model: Path) -> None:
    before = weights_of(model).stat()
    change_a_byte(model)
    set_back = (before.st_atime_ns, before.st_mtime_ns)
    os.utime(weights_of(model), ns=set_back)
    # A file system's clock has a resolution, too: as often as it takes to go on.
    while weights_of(model).stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(weights_of(model), ns=set_back)


def put_another_file_in_its_place(model: Path) -> None:
    before = weights_of(model).stat()
    other = model / "other"
    other.write_bytes(weights_of(model).read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(weights_of(model))


def append_a_byte(model: Path) -> None:
    with weights_of(model).open("ab") as file:
        file.write(b"\0")


def add_a_file(model: Path) -> None:
    (model / "second.safetensors").write_bytes(b"more")


def rename_the_file(model: Path) -> None:
    weights_of(model).rename(model / "renamed.safetensors")


def change_the_configuration(model: Path) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace("}", ', "more": 1}', 1))


@pytest.mark.parametrize(
    "change",
    [
        change_a_byte,
        change_a_byte_and_set_the_time_back,
        put_another_file_in_its_place,
        append_a_byte,
        add_a_file,
        rename_the_file,
        change_the_configuration,
    ],
)
def test_whatever_changes_a_file_has_it_hashed_again(
    hashing: Hashing, model: Path, change: Callable[[Path], None]
) -> None:
    hashing.name(model)
    change(model)
    assert hashing.name(model) == fingerprint(model)
    assert hashing.count == 2
    assert hashing.name(model) == fingerprint(model)
    assert hashing.count == 2, "the new name is remembered in its turn"


@pytest.mark.parametrize(("age", "hashed"), [(2 * 10**9 - 1, 2), (2 * 10**9, 1)])
def test_files_that_were_just_written_are_not_remembered(
    hashing: Hashing, model: Path, age: int, hashed: int
) -> None:
    os.utime(weights_of(model))
    newest = max(max(s.st_mtime_ns, s.st_ctime_ns) for s in map(Path.stat, model.iterdir()))
    hashing.now = newest + age
    hashing.name(model)
    hashing.name(model)
    assert hashing.count == hashed


def test_files_that_change_while_they_are_hashed_are_not_remembered(
    hashing: Hashing, model: Path
) -> None:
    hashing.cache.fingerprint(model, lambda *_: os.utime(weights_of(model)))
    assert not hashing.directory.exists()


# --- a cache that is of no use -----------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 5000, b"[" * 1000])
def test_a_damaged_record_is_replaced(hashing: Hashing, model: Path, content: bytes) -> None:
    hashing.name(model)
    hashing.record().write_bytes(content)
    for _ in range(2):
        assert hashing.name(model) == fingerprint(model)
    assert hashing.count == 2


@pytest.mark.parametrize(
    ("field_", "other"), [('"version":1', '"version":2'), ('"fingerprint":"', '"fingerprint":"0')]
)
def test_a_record_of_another_form_is_replaced(
    hashing: Hashing, model: Path, field_: str, other: str
) -> None:
    hashing.name(model)
    record = hashing.record().read_text()
    assert field_ in record
    hashing.record().write_text(record.replace(field_, other))
    for _ in range(2):
        assert hashing.name(model) == fingerprint(model)
    assert hashing.count == 2


def test_a_record_that_is_no_file_does_not_matter(hashing: Hashing, model: Path) -> None:
    hashing.name(model)
    path = hashing.record()
    path.unlink()
    path.mkdir()
    assert hashing.name(model) == fingerprint(model)
    assert list(hashing.directory.iterdir()) == [path], "what could not be put there is gone"


def test_a_cache_that_cannot_be_written_does_not_matter(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    hashing = Hashing(tmp_path / "file" / "fingerprints")
    assert hashing.name(model) == hashing.name(model) == fingerprint(model)
    assert hashing.count == 2


def test_a_directory_that_is_no_model_is_refused_as_without_a_cache(
    hashing: Hashing, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no safetensors"):
        hashing.name(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        hashing.name(tmp_path)
