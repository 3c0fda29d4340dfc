"""The random checkpoint that is measured, written once and kept."""

from pathlib import Path
from typing import Final

import xxhash

from benchmarks.kept_files import kept
from shared.kimi_linear.presets import PRESETS, PresetName, write_random_checkpoint

PRESET: Final[PresetName] = "medium"


def random_checkpoint(workdir: Path, preset: PresetName = PRESET) -> Path:
    """Give the model directory of a preset, written if it is not there yet.

    Its name holds a hash of the configuration, so a preset that changes gets a new one.
    """
    config = PRESETS[preset].config.model_dump_json().encode()
    directory = workdir / f"{preset}-{xxhash.xxh3_64_hexdigest(config)}"
    return kept(directory, lambda path: write_random_checkpoint(path, preset))
