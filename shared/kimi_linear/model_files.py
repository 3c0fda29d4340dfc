"""Reading the files of a model directory, which may be anything until they were checked."""

import json
import os
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from shared.errors import CheckpointError

LARGEST_JSON: Final = 128 * 2**20
"""Bytes; tokenizers of a quarter million tokens take about 35 MB."""


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a file that has at most `limit` bytes.

    Raises:
        CheckpointError: the file cannot be read or is larger.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CheckpointError(f"{path} has {size} bytes, above the limit of {limit}")
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read, is too large or is not a JSON object.
    """
    try:
        content = json.loads(read_bounded(path, LARGEST_JSON))
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def first_problem(error: ValidationError) -> str:
    """What is wrong with a file's content, the first of it: the field and what was found there."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    if not field:
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{field} is missing"
    return f"{field}: {first['msg']}, found {first['input']!r:.80}"
