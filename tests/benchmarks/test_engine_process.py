"""A run of our engine measures every point that was asked for, in the dtype it computes in."""

import sys
from pathlib import Path

import pytest

from benchmarks.checkpoint import random_checkpoint
from benchmarks.engine_process import measure
from benchmarks.engine_profile import tables
from benchmarks.measured_engine import MeasuredEngine
from benchmarks.measurement import Workload

WORKLOAD = Workload(prefill=(32, 8), decode=(1, 3), context=8, steps=2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def engine(workdir: Path) -> MeasuredEngine:
    return MeasuredEngine(random_checkpoint(workdir, "tiny"), "float32", threads=1)


def test_every_point_is_measured(engine: MeasuredEngine) -> None:
    run = measure(engine, WORKLOAD)
    assert run.dtype == "float32"
    assert {speed.point for speed in run.speeds} == set(WORKLOAD.points)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its memory")
def test_memory_is_told_for_the_loaded_model_and_each_prompt_in_order(
    engine: MeasuredEngine,
) -> None:
    memory = measure(engine, WORKLOAD).memory
    assert [use.prompt_tokens for use in memory] == [0, 8, 32]
    assert all(use.anonymous_bytes <= use.peak_bytes for use in memory)


def test_a_profile_has_a_table_for_every_point_with_every_kernel_in_it(workdir: Path) -> None:
    """Of prefill by the names of the operations, of decode by those of the captured kernels."""
    model = random_checkpoint(workdir, "tiny")
    found = "\n".join(tables(model, "float32", 1, WORKLOAD)).strip().split("\n\n")
    assert len(found) == len(WORKLOAD.points)
    prompts = len(WORKLOAD.prefill)
    for table in found[:prompts]:
        for kernel in ("linear [", "experts [", "kda", "latent_attention", "between kernels"):
            assert f"\n{kernel}" in table
    for table in found[prompts:]:
        for kernel in ("multiply [", "feed_forward [", "attend_step [", "attend_to_latents ["):
            assert f"\n{kernel}" in table


def test_the_checkpoint_is_written_once(workdir: Path, engine: MeasuredEngine) -> None:
    written = random_checkpoint(workdir, "tiny") / "model.safetensors"
    before = written.stat().st_mtime_ns
    assert random_checkpoint(workdir, "tiny") / "model.safetensors" == written
    assert written.stat().st_mtime_ns == before
