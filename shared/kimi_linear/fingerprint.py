"""The name of a model: a hash over its configuration and all bytes of its weights. No torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import xxhash

from shared.errors import CheckpointError
from shared.kimi_linear.config import CONFIG_FILE
from shared.kimi_linear.model_files import read_json
from shared.kimi_linear.read_progress import ReadProgress, unobserved

BLOCK_BYTES: Final = 2**20


def fingerprint(directory: str | Path, progress: ReadProgress = unobserved) -> str:
    """Identify a model by the content of its directory.

    xxh3_128 over the configuration as canonical JSON and over its safetensors files in the order of
    their names, each preceded by its length. It is not cryptographic: it tells models apart that
    were not made to be confused.

    Args:
        directory: of the model.
        progress: told of the bytes of the safetensors files.

    Returns:
        32 hexadecimal digits.

    Raises:
        CheckpointError: the directory has no readable configuration, or no weights, or a file of
            them cannot be read.
    """
    root = Path(directory)
    config = json.dumps(
        read_json(root / CONFIG_FILE), sort_keys=True, separators=(",", ":")
    ).encode()
    digest = xxhash.xxh3_128()
    _add_length(digest, len(config))
    digest.update(config)
    try:
        _add_files(digest, weight_files(root), progress)
    except OSError as error:
        raise CheckpointError(f"{error.filename or root}: {error.strerror}") from None
    return digest.hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The files whose content is part of a model's name, in the order of their names.

    Raises:
        CheckpointError: there is none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no safetensors file")
    return files


def _add_files(digest: xxhash.xxh3_128, files: list[Path], progress: ReadProgress) -> None:
    lengths = {path: path.stat().st_size for path in files}
    read_bytes, total_bytes = 0, sum(lengths.values())
    progress(read_bytes, total_bytes)
    for path, length in lengths.items():
        _add_length(digest, length)
        for block in _blocks(path):
            digest.update(block)
            read_bytes += len(block)
            progress(read_bytes, total_bytes)


def _add_length(digest: xxhash.xxh3_128, length: int) -> None:
    digest.update(length.to_bytes(8, "little"))


def _blocks(path: Path) -> Iterator[memoryview]:
    """The content of a file; a block is overwritten by the next."""
    buffer = bytearray(BLOCK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            yield view[:read]
