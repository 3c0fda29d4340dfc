"""Where the engine's time goes, by operation."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from torch.profiler import ProfilerActivity, profile

from benchmarks.measured_engine import MeasuredEngine
from benchmarks.measurement import Workload

ROWS: Final = 20


def tables(engine: MeasuredEngine, workload: Workload) -> Iterator[str]:
    """Give a table for each point of a workload; each runs once before it is profiled."""
    for tokens in workload.prefill:
        with engine.requests(2, room=tokens) as (first, second):
            engine.prefill(tokens, first)
            yield f"{engine.dtype}, prefill of {tokens} tokens"
            yield from _operations(partial(engine.prefill, tokens, second))
    context, steps = workload.context, workload.steps
    for requests in workload.decode:
        with engine.requests(requests, room=context + 2 * steps) as states:
            for state in states:
                engine.prefill(context, state)
            engine.decode(steps, states)
            yield f"{engine.dtype}, {steps} steps of {requests} requests after {context} tokens"
            yield from _operations(partial(engine.decode, steps, states))


def _operations(work: Callable[[], float]) -> Iterator[str]:
    """The operations by the time spent in themselves; the last row has all others."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = work()
    milliseconds = {
        f"{event.key:<50.50}{event.count:>10}": event.self_cpu_time_total / 1000
        for event in profiler.key_averages()
    }
    total = sum(milliseconds.values())
    ordered = sorted(milliseconds.items(), key=lambda item: -item[1])
    yield f"{'operation':<50}{'calls':>10}{'ms':>12}{'share':>8}"
    for name, spent in ordered[:ROWS]:
        yield f"{name}{spent:>12.1f}{spent / total:>8.1%}"
    others = sum(spent for _, spent in ordered[ROWS:])
    yield f"{f'{len(ordered[ROWS:])} others':<60}{others:>12.1f}{others / total:>8.1%}"
    yield f"{'by the clock':<60}{seconds * 1000:>12.1f}"
    yield ""
