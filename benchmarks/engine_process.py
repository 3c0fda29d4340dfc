"""Measures or profiles our engine at one dtype, in a process of its own: its memory is known then.

Prints an `EngineRun` as JSON, or tables.
"""

import argparse
from pathlib import Path
from typing import get_args

from benchmarks.engine_profile import tables
from benchmarks.measured_engine import MeasuredEngine
from benchmarks.measurement import EngineRun, Point, Speed, Workload
from benchmarks.process_memory import memory_use, reset_peak
from shared.kernels.dtypes import WeightDTypeChoice


def measure(engine: MeasuredEngine, workload: Workload) -> EngineRun:
    """Measure every point once, after a prefill and a step that do not count.

    Prompts grow from one to the next: what the allocator keeps is then no more than the prompt at
    hand needed.
    """
    memory = memory_use(prompt_tokens=0)
    _decode(engine, 1, workload.context, steps=1)
    speeds = []
    for tokens in sorted(workload.prefill):
        reset_peak()
        with engine.requests(1, room=tokens) as (state,):
            seconds = engine.prefill(tokens, state)
            memory += memory_use(tokens)
        point = Point(phase="prefill", size=tokens)
        speeds.append(Speed(point=point, tokens_per_second=tokens / seconds))
    for requests in workload.decode:
        seconds = _decode(engine, requests, workload.context, workload.steps)
        point = Point(phase="decode", size=requests)
        speeds.append(Speed(point=point, tokens_per_second=requests * workload.steps / seconds))
    return EngineRun(dtype=engine.dtype, speeds=tuple(speeds), memory=memory)


def _decode(engine: MeasuredEngine, requests: int, context: int, steps: int) -> float:
    with engine.requests(requests, room=context + steps) as states:
        for state in states:
            engine.prefill(context, state)
        return engine.decode(steps, states)


def main() -> None:
    """Do what the arguments say; they come from `benchmarks.engine`."""
    parser = argparse.ArgumentParser(prog="benchmarks.engine_process", description=__doc__)
    parser.add_argument("task", choices=("measure", "profile"))
    parser.add_argument("model", type=Path)
    parser.add_argument("dtype", choices=get_args(WeightDTypeChoice))
    parser.add_argument("threads", type=int)
    parser.add_argument("workload", type=Workload.model_validate_json, help="as JSON")
    given = parser.parse_args()
    loaded = given.model, given.dtype, given.threads
    if given.task == "measure":
        print(measure(MeasuredEngine(*loaded), given.workload).model_dump_json())
    else:
        print("\n".join(tables(*loaded, given.workload)))


if __name__ == "__main__":
    main()
