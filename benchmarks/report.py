"""The figures of a run: as JSON with every measurement, and as tables of the best ones."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from pydantic import BaseModel, ConfigDict, PositiveInt

from benchmarks.measurement import MemoryUse, Point, Speed, Workload
from benchmarks.processor import Processor

NOT_MEASURED: Final = "-"


class Comparison(BaseModel):
    """Both engines at one dtype."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    peer_dtype: str | None
    """None: there is no peer in this run."""
    engine: tuple[Speed, ...]
    peer: tuple[Speed, ...]
    memory: tuple[MemoryUse, ...]
    failures: tuple[str, ...]
    """What could not be measured, and why."""


class Report(BaseModel):
    """A whole run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: Processor
    model: str
    """The name of its directory."""
    threads: PositiveInt
    rounds: PositiveInt
    workload: Workload
    comparisons: tuple[Comparison, ...]

    def lines(self) -> Iterator[str]:
        """What a person reads."""
        yield str(self.processor)
        yield f"model {self.model}"
        yield (
            f"{self.threads} threads, tokens/s, the best of {self.rounds}; decode: requests "
            f"together, {self.workload.steps} steps after {self.workload.context} tokens each"
        )
        for comparison in self.comparisons:
            yield ""
            yield from speed_table(comparison, self.workload.points)
            yield from memory_table(comparison.memory)
            yield from comparison.failures


def best(speeds: Iterable[Speed]) -> dict[Point, float]:
    """The highest speed of each point: what disturbs a measurement only ever slows it down."""
    highest: dict[Point, float] = {}
    for speed in speeds:
        highest[speed.point] = max(speed.tokens_per_second, highest.get(speed.point, 0.0))
    return highest


def speed_table(comparison: Comparison, points: Sequence[Point]) -> Iterator[str]:
    """A row for each point: ours, and beside the peer's its ratio to it."""
    engine, peer = best(comparison.engine), best(comparison.peer)
    peer_name = f"llama.cpp {comparison.peer_dtype}" if comparison.peer_dtype else ""
    ratio = "ratio" if comparison.peer_dtype else ""
    yield _row(comparison.dtype, "prfaas", peer_name, ratio)
    for point in points:
        cells = [_speed(engine.get(point))]
        if comparison.peer_dtype:
            cells += [_speed(peer.get(point)), _ratio(engine.get(point), peer.get(point))]
        yield _row(str(point), *cells)


def memory_table(memory: Sequence[MemoryUse]) -> Iterator[str]:
    """A row for each prompt, with what a token more costs from the one before to it."""
    if not memory:
        return
    yield _row("memory", "peak", "anonymous", "a token more")
    loaded, *prefills = memory
    yield _row("model loaded", *_sizes(loaded))
    for number, use in enumerate(prefills):
        growth = [_growth(prefills[number - 1], use)] if number else []
        yield _row(f"prefill {use.prompt_tokens}", *_sizes(use), *growth)


def _row(name: str, *cells: str) -> str:
    return (f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells)).rstrip()


def _speed(tokens_per_second: float | None) -> str:
    return NOT_MEASURED if tokens_per_second is None else f"{tokens_per_second:.1f}"


def _ratio(engine: float | None, peer: float | None) -> str:
    return NOT_MEASURED if engine is None or peer is None else f"{engine / peer:.2f}"


def _sizes(use: MemoryUse) -> tuple[str, str]:
    return (_mebibytes(use.peak_bytes), _mebibytes(use.anonymous_bytes))


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _growth(shorter: MemoryUse, longer: MemoryUse) -> str:
    tokens = longer.prompt_tokens - shorter.prompt_tokens
    return f"{(longer.peak_bytes - shorter.peak_bytes) / tokens:.0f} B"
