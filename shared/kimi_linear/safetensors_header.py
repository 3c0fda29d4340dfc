"""The header of a safetensors file: which tensors it holds, and where. No torch.

The format: eight bytes with the length of the header, the header as JSON, then the tensors' bytes
without gaps (https://github.com/huggingface/safetensors#format). It is read here and not by the
format's own library so that a refusal names the tensor.
"""

from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shared.errors import CheckpointError

LENGTH_BYTES: Final = 8
LONGEST_HEADER: Final = 100_000_000
"""Bytes; the format's own limit."""

Shape = tuple[int, ...]
Size = Annotated[int, Field(ge=0, strict=True)]


class StoredTensor(BaseModel):
    """One tensor as the header has it.

    Attributes:
        dtype: in the format's names, as F32 or BF16.
        shape: may be anything; nothing is allocated by it.
        data_offsets: of its first byte and of the one after its last, from the end of the header.
    """

    model_config = ConfigDict(frozen=True)

    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]

    @property
    def nbytes(self) -> int:
        """How many bytes it has in the file."""
        return self.data_offsets[1] - self.data_offsets[0]


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a file holds.

    Attributes:
        tensors: by name. Their bytes are in the file, and fill it without gaps or overlaps.
        data_start: the byte of the file that their offsets count from.
    """

    tensors: dict[str, StoredTensor]
    data_start: int


_JSON_OBJECT: Final = TypeAdapter(dict[str, Any])
_STORED_TENSORS: Final = TypeAdapter(dict[str, StoredTensor])


def read_header(path: Path, content: bytes | mmap) -> SafetensorsHeader:
    """Read and check the header of a file.

    Args:
        path: of the file, for errors.
        content: all of the file.

    Raises:
        CheckpointError: the file is no safetensors file, or its tensors are not where its header
            says; names the tensor, what was expected and what was found.
    """
    try:
        length = _header_length(content)
        tensors = _parsed(content[LENGTH_BYTES : LENGTH_BYTES + length])
        _check_places(tensors, len(content) - LENGTH_BYTES - length)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return SafetensorsHeader(tensors, LENGTH_BYTES + length)


def _header_length(content: bytes | mmap) -> int:
    if len(content) < LENGTH_BYTES:
        raise CheckpointError(f"it has {len(content)} bytes, expected at least {LENGTH_BYTES}")
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    if length > LONGEST_HEADER:
        raise CheckpointError(f"its header has {length} bytes, expected at most {LONGEST_HEADER}")
    present = len(content) - LENGTH_BYTES
    if length > present:
        raise CheckpointError(f"its header is cut off, expected {length} bytes, found {present}")
    return length


def _parsed(header: bytes) -> dict[str, StoredTensor]:
    try:
        entries = _JSON_OBJECT.validate_json(header)
    except ValidationError as error:
        raise CheckpointError(f"its header is not a JSON object: {_problem(error)}") from None
    entries.pop("__metadata__", None)
    try:
        return _STORED_TENSORS.validate_python(entries)
    except ValidationError as error:
        name, *field = error.errors(include_url=False)[0]["loc"]
        where = ".".join(map(str, field)) or "its entry"
        raise CheckpointError(f"tensor {name}: {where}: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    return error.errors(include_url=False)[0]["msg"]


def _check_places(tensors: dict[str, StoredTensor], present: int) -> None:
    """Hold the tensors to the format: one begins where another ends, and they fill the file.

    Two entries of one name are found, too: the first is lost to JSON and leaves a gap.
    """
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        start, stop = tensor.data_offsets
        if start != end:
            raise CheckpointError(f"tensor {name} begins at byte {start}, expected {end}")
        if stop < start:
            raise CheckpointError(
                f"tensor {name} ends at byte {stop}, expected {start}, where it begins, or later"
            )
        if stop > present:
            raise CheckpointError(
                f"tensor {name} of shape {tensor.shape} is cut off, "
                f"expected {stop - start} bytes, found {present - start}"
            )
        end = stop
    if end != present:
        raise CheckpointError(
            f"its tensors have {end} bytes, expected {present}, as many as follow its header"
        )
