"""The weight files of a model directory, mapped: a tensor is copied once, to where it is wanted."""

import math
import os
from collections.abc import Callable
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor

from shared.errors import CheckpointError
from shared.kimi_linear.model_files import read_json
from shared.kimi_linear.read_progress import ReadProgress, unobserved
from shared.kimi_linear.safetensors_header import Shape, read_header

WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
FLOAT_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorFiles:
    """The tensors of a directory by name, each read once.

    All files are mapped, and their headers checked, when the block is entered; what is read is
    copied from the page cache, so that no memory is taken but the caller's. A file's mapping ends
    with the last of its tensors, and all end with the block. As with any mapping, a file must not
    be cut short meanwhile: the system would kill the process.
    """

    def __init__(
        self,
        directory: Path,
        is_ignored: Callable[[str], bool],
        progress: ReadProgress = unobserved,
    ) -> None:
        """Say what to read.

        Args:
            directory: holds `model.safetensors`, or `model.safetensors.index.json` and what it
                names.
            is_ignored: whether a tensor of this name is left alone if the files have it.
            progress: told of the tensors' bytes, without those that are ignored.
        """
        self._directory = directory
        self._is_ignored = is_ignored
        self._progress = progress
        self._unread: dict[str, _TensorFile] = {}
        self._read_bytes = 0
        self._total_bytes = 0

    def __enter__(self) -> Self:
        """Map the files.

        Raises:
            CheckpointError: a file is missing or damaged, lacks a tensor that the index places in
                it, or has one that another file has.
        """
        for file_name, expected in self._placed().items():
            self._add(self._directory / file_name, expected)
        self._progress(0, self._total_bytes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unread.clear()

    def read_into(self, target: Tensor, name: str) -> None:
        """Copy a tensor of floats; dimensions of one are not compared.

        Args:
            target: of the expected shape, in any dtype.
            name: of a tensor that was not read yet.

        Raises:
            CheckpointError: the tensor is missing, has another shape or dtype, or not as many
                bytes as these say.
        """
        expected = tuple(target.shape)
        file = self._unread.pop(name, None)
        if file is None:
            raise CheckpointError(
                f"{self._directory}: tensor {name} is missing, expected shape {expected}"
            )
        tensor = file.tensor(name, expected)
        target.copy_(tensor)
        self._read_bytes += tensor.nbytes
        self._progress(self._read_bytes, self._total_bytes)

    def refuse_unread(self) -> None:
        """Refuse tensors that nothing asked for: the model would compute something else."""
        if self._unread:
            raise CheckpointError(
                f"{self._directory}: {len(self._unread)} tensors are not part of this "
                f"architecture, the first is {min(self._unread)}"
            )

    def _placed(self) -> dict[str, list[str]]:
        """The files to read, and the tensors that have to be in each as far as an index says."""
        index = self._directory / INDEX_FILE
        if not index.exists():
            return {WEIGHTS_FILE: []}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map is missing, or names no tensor")
        placed: dict[str, list[str]] = {}
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise CheckpointError(
                    f"{index}: weight_map: tensor {name} is in {file_name!r}, "
                    "expected the name of a file in the same directory"
                )
            placed.setdefault(file_name, []).append(name)
        return placed

    def _add(self, path: Path, expected: list[str]) -> None:
        try:
            content = _map(path)
        except (OSError, ValueError):  # The latter of a name that no file can have.
            wanted = f", expected tensor {expected[0]} in it" if expected else ""
            raise CheckpointError(f"{path} is missing or cannot be read{wanted}") from None
        file = _TensorFile(path, content)
        for name in expected:
            if name not in file.tensors:
                raise CheckpointError(f"{path}: tensor {name} is missing, expected by the index")
        for name, tensor in file.tensors.items():
            if self._is_ignored(name):
                continue
            if name in self._unread:
                raise CheckpointError(
                    f"{path}: tensor {name} is found again, expected only in "
                    f"{self._unread[name].path.name}"
                )
            self._unread[name] = file
            self._total_bytes += tensor.nbytes


class _TensorFile:
    """A mapped file; the mapping ends when neither this nor one of its tensors is referred to."""

    def __init__(self, path: Path, content: mmap) -> None:
        self.path = path
        self._content = content
        header = read_header(path, content)
        self.tensors = header.tensors
        self._data_start = header.data_start

    def tensor(self, name: str, expected: Shape) -> Tensor:
        """A tensor, of the shape that is expected, whose memory is the file."""
        stored = self.tensors[name]
        if _without_singletons(stored.shape) != _without_singletons(expected):
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {stored.shape}, expected {expected}"
            )
        dtype = FLOAT_DTYPES.get(stored.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {stored.dtype}, "
                f"expected one of {', '.join(FLOAT_DTYPES)}"
            )
        count = math.prod(expected)
        if stored.nbytes != count * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {stored.shape} and dtype {stored.dtype} "
                f"has {stored.nbytes} bytes, expected {count * dtype.itemsize}"
            )
        start = self._data_start + stored.data_offsets[0]
        flat = torch.frombuffer(self._content, dtype=dtype, count=count, offset=start)
        return flat.view(expected)


def _map(path: Path) -> mmap:
    """Map a file; privately writable only because torch warns of memory that is not."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise CheckpointError(f"{path} is damaged: it is empty")
        return mmap(file.fileno(), 0, access=ACCESS_COPY)


def _without_singletons(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
