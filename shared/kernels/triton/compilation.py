"""Ahead-of-time compilation for GPUs that need not be there, and what a kernel takes of them."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shared.kernels.triton.published_shape import PublishedShape

_MODULES: Final = (
    "convolution",
    "normalization",
    "kda_prefill",
    "kda_decode",
    "mla_decode",
    "experts",
)
_USAGE: Final = re.compile(r"REG:(\d+) STACK:(\d+) ")


@dataclass(frozen=True, slots=True)
class Chip:
    """A generation of GPUs.

    Attributes:
        name: as NVIDIA calls it.
        capability: compute capability times ten.
        shared_memory: most bytes that one block can have (CUDA C++ Programming Guide, "Compute
            Capabilities"): 163 KiB on an A100, 227 KiB on an H100.
    """

    name: str
    capability: int
    shared_memory: int


CHIPS: Final = (Chip("sm_80", 80, 163 * 1024), Chip("sm_90", 90, 227 * 1024))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a compiled kernel takes.

    Attributes:
        shared_memory: bytes of a block.
        registers: of a thread, at most 255.
        spilled: bytes of a thread's variables that are in memory for want of registers.
    """

    shared_memory: int
    registers: int
    spilled: int


def published_shapes() -> Iterator[PublishedShape]:
    """All kernels of the package at the shapes of the published model."""
    for name in _MODULES:
        module = f"{__package__}.{name}"
        if find_spec(module) is not None:
            yield from import_module(module).PUBLISHED_SHAPES


def footprint(shape: PublishedShape, chip: Chip) -> Footprint:
    """Compile a kernel for a chip.

    Raises:
        RuntimeError: Triton's interpreter is on, which leaves nothing to compile, or the binary
            could not be read.
        triton.CompilationError: the kernel is not valid for the chip.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    compiled = triton.compile(
        _source(shape),
        target=GPUTarget("cuda", chip.capability, 32),
        options={"num_warps": shape.warps, "num_stages": shape.stages},
    )
    usage = _USAGE.search(_resource_usage(compiled.asm["cubin"]))
    if usage is None:
        raise RuntimeError(f"{shape.name}: cuobjdump does not tell the use of registers")
    return Footprint(compiled.metadata.shared, int(usage[1]), int(usage[2]))


def _source(shape: PublishedShape) -> ASTSource:
    """Separate types from the divisors that are written after them."""
    names = shape.kernel.arg_names  # type: ignore[attr-defined]  # triton keeps no types
    types, attributes = {}, {}
    for place, name in enumerate(names):
        if name in shape.constants:
            types[name] = "constexpr"
            continue
        types[name], _, divisor = shape.signature[name].partition(":")
        if divisor:
            attributes[(place,)] = [["tt.divisibility", int(divisor)]]
    return ASTSource(shape.kernel, types, shape.constants, attributes)


def _resource_usage(binary: bytes) -> str:
    """What the tool in Triton's wheel reads in a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
