"""llama.cpp is asked for the points that ours are measured at."""

from pathlib import Path

import pytest

from benchmarks.measurement import Point, Workload
from benchmarks.peer import WARMED_UP_TOKENS, LlamaCpp
from benchmarks.programs import ProgramError

WORKLOAD = Workload(prefill=(512,), decode=(8,), context=512, steps=32)
PREFILL = '{"n_prompt": %d, "n_gen": 0, "avg_ts": 400.0}'
DECODE = '{"pl": %d, "speed_tg": 200.0}'


@pytest.fixture
def build(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return tmp_path


def write_program(build: Path, name: str, result: str) -> None:
    """A program that keeps its arguments and prints a result."""
    program = build / "bin" / name
    program.write_text(f"#!/bin/sh\necho \"$@\" > '{build}/arguments'\necho '{result}'\n")
    program.chmod(0o755)


def measure(build: Path, point: Point) -> str:
    """Measure a point; gives the arguments that the program got."""
    peer = LlamaCpp(source=build, build=build, packages=build)
    assert peer.measure(Path("model.gguf"), point, WORKLOAD, threads=2).point == point
    return (build / "arguments").read_text().strip()


def test_a_prompt_is_prefilled_alone_and_generates_nothing(build: Path) -> None:
    write_program(build, "llama-bench", PREFILL % 512)
    arguments = measure(build, Point(phase="prefill", size=512))
    assert arguments == "-m model.gguf -t 2 -p 512 -n 0 -r 1 -o jsonl"


def test_a_long_prompt_runs_once(build: Path) -> None:
    tokens = WARMED_UP_TOKENS + 1
    write_program(build, "llama-bench", PREFILL % tokens)
    assert "--no-warmup" in measure(build, Point(phase="prefill", size=tokens))


def test_requests_are_decoded_together_from_the_context_that_ours_have(build: Path) -> None:
    write_program(build, "llama-batched-bench", DECODE % 8)
    arguments = measure(build, Point(phase="decode", size=8))
    assert "-npp 512 -ntg 32 -npl 8 -c 4352" in arguments


def test_the_result_of_another_point_is_refused(build: Path) -> None:
    write_program(build, "llama-batched-bench", DECODE % 7)
    with pytest.raises(ProgramError, match="decode 7, not decode 8"):
        measure(build, Point(phase="decode", size=8))


def test_a_folder_without_the_programs_is_no_build(build: Path) -> None:
    write_program(build, "llama-bench", PREFILL % 512)
    with pytest.raises(ProgramError, match="bin/llama-batched-bench is missing"):
        LlamaCpp.found(build, workdir=build)
