"""Machine code is kept for the next process, and a kernel runs where it cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import resource, sys
import torch
from shared.kernels.cpu.normalization import rms_norm
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
print(rms_norm(torch.full((1, 4), 2.0), torch.ones(4), 0.0).tolist())
"""
"""A file that grows beyond the limit fails as it does on a full disk."""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes differ elsewhere")
@pytest.mark.parametrize(("most_bytes", "is_kept"), [(0, False), (2**30, True)])
def test_a_kernel_runs_whether_or_not_its_code_can_be_kept(
    tmp_path: Path, most_bytes: int, is_kept: bool
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(most_bytes)],
        env={"NUMBA_CACHE_DIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert run.stdout.strip() == "[[1.0, 1.0, 1.0, 1.0]]"
    assert any(path.stat().st_size for path in tmp_path.rglob("*.nbc")) == is_kept
