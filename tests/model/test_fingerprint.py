"""A fingerprint names a model: the same content has the same, any other content another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from shared.errors import CheckpointError
from shared.kimi_linear.fingerprint import fingerprint

WriteCheckpoint = Callable[[dict[str, Tensor], dict[str, Any]], Path]


@pytest.fixture
def directory(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> Path:
    return write_checkpoint(reference_tensors, reference_config)


def test_it_is_128_bits_in_hexadecimal(directory: Path) -> None:
    assert len(bytes.fromhex(fingerprint(directory))) == 16


def test_the_reference_model_keeps_its_name(reference_directory: Path) -> None:
    assert fingerprint(reference_directory) == "1b52f9c40a2c2d4a7a781216d07ca4a9"


def test_the_spelling_of_the_configuration_does_not_matter(
    directory: Path, reference_config: dict[str, Any]
) -> None:
    before = fingerprint(directory)
    reordered = dict(reversed(reference_config.items()))
    (directory / "config.json").write_text(json.dumps(reordered, indent=4))
    assert fingerprint(directory) == before


def test_files_that_are_not_part_of_the_model_do_not_matter(directory: Path) -> None:
    before = fingerprint(directory)
    (directory / "README.md").write_text("hello")
    assert fingerprint(directory) == before


def test_any_field_of_the_configuration_matters(
    directory: Path, reference_config: dict[str, Any]
) -> None:
    before = fingerprint(directory)
    (directory / "config.json").write_text(json.dumps({**reference_config, "rms_norm_eps": 1e-6}))
    assert fingerprint(directory) != before


@pytest.mark.parametrize("position", [0.5, -1])
def test_any_byte_of_the_weights_matters(directory: Path, position: float) -> None:
    before = fingerprint(directory)
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    index = int(position * len(content)) if position > 0 else -1
    content[index] ^= 1
    weights.write_bytes(content)
    assert fingerprint(directory) != before


def test_a_directory_without_weights_has_no_name(
    tmp_path: Path, reference_config: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(reference_config))
    with pytest.raises(CheckpointError, match="no safetensors"):
        fingerprint(tmp_path)


def test_a_weight_file_that_cannot_be_read_is_named(directory: Path) -> None:
    (directory / "second.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"second\.safetensors: Is a directory"):
        fingerprint(directory)


def test_progress_counts_the_bytes_of_all_weight_files(directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "second.safetensors").write_bytes(weights)
    calls: list[tuple[int, int]] = []
    fingerprint(directory, lambda read_bytes, total_bytes: calls.append((read_bytes, total_bytes)))
    total = 2 * len(weights)
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
