"""The name of a model: a hash over its configuration and all bytes of its weights. No torch."""

import json
from pathlib import Path
from typing import Final

import xxhash

from shared.errors import CheckpointError
from shared.kimi_linear.config import CONFIG_FILE
from shared.kimi_linear.model_files import read_json

BLOCK_BYTES: Final = 2**20


def fingerprint(directory: str | Path) -> str:
    """Identify a model by the content of its directory.

    xxh3_128 over the configuration as canonical JSON and over its safetensors files in the order of
    their names, each preceded by its length. It is not cryptographic: it tells models apart that
    were not made to be confused.

    Returns:
        32 hexadecimal digits.

    Raises:
        CheckpointError: the directory has no readable configuration or no weights.
    """
    root = Path(directory)
    config = json.dumps(
        read_json(root / CONFIG_FILE), sort_keys=True, separators=(",", ":")
    ).encode()
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{root} has no safetensors file")
    digest = xxhash.xxh3_128()
    _add_length(digest, len(config))
    digest.update(config)
    for path in files:
        _add_length(digest, path.stat().st_size)
        _add_file(digest, path)
    return digest.hexdigest()


def _add_length(digest: xxhash.xxh3_128, length: int) -> None:
    digest.update(length.to_bytes(8, "little"))


def _add_file(digest: xxhash.xxh3_128, path: Path) -> None:
    buffer = bytearray(BLOCK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(view[:read])
