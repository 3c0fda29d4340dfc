"""What takes long is made once, and only whole."""

from pathlib import Path

import pytest

from benchmarks.kept_files import kept


def write(path: Path) -> None:
    path.write_text("whole")


def test_a_file_is_made_once(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    assert kept(target, write) == target
    target.write_text("touched since")
    assert kept(target, write).read_text() == "touched since"


def test_what_an_interruption_left_is_made_anew(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        path.mkdir()
        (path / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "file", interrupted)
    assert not (tmp_path / "file").exists()
    assert kept(tmp_path / "file", write).read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
