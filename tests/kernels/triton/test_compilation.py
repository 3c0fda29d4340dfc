"""Every kernel compiles at the published shapes for GPUs that are not there, and fits them."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.kernels.triton.compilation import CHIPS, published_shapes


@dataclass(frozen=True)
class Row:
    """Of the table that `benchmarks.compiled_kernels` prints."""

    kernel: str
    chip: str
    warps: int
    stages: int
    shared_memory: int
    limit: int
    registers: int
    spilled: int

    @classmethod
    def parse(cls, line: str) -> "Row":
        kernel, chip, *figures = (cell.strip() for cell in line.strip("|\n").split("|"))
        return cls(kernel, chip, *(int(figure.replace(",", "")) for figure in figures))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Compiled in a process of its own: in this one, kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    printed = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_kernels"],
        cwd=Path(__file__).parents[3],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [Row.parse(line) for line in printed.splitlines()[2:]]


def test_every_kernel_compiles_for_every_chip(table: list[Row]) -> None:
    expected = [(shape.name, chip.name) for shape in published_shapes() for chip in CHIPS]
    assert [(row.kernel, row.chip) for row in table] == expected
    assert len(set(expected)) == len(expected) > 0


def test_every_block_fits_in_shared_memory(table: list[Row]) -> None:
    limits = {"sm_80": 166_912, "sm_90": 232_448}
    assert all(row.limit == limits[row.chip] for row in table)
    assert [row for row in table if row.shared_memory > row.limit] == []


def test_no_kernel_runs_out_of_registers(table: list[Row]) -> None:
    assert [row for row in table if row.spilled > 0] == []
