"""One request's parts side by side on a line of time, from what the services have logged of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.two_regions import Answer, LogLine, TwoRegions

WIDTH: Final = 72

_ROWS: Final = (
    ("prefill_worker", "chunk prefilled", "prefill"),
    ("prefill_worker", "segment stored", "publish"),
    ("decode_worker", "segment pulled", "pull"),
    ("decode_worker", "state restored", "restore"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a request, in seconds since 1970."""

    start: float
    stop: float


def trace_lines(regions: TwoRegions, answer: Answer) -> Iterator[str]:
    """Draw a request: a row for each kind of part, a mark where one was under way."""
    rows = {
        name: [
            _span(line)
            for line in regions.log_lines(service, answer.request_id)
            if line.event == event
        ]
        for service, event, name in _ROWS
    }
    rows["tokens"] = [Span(at, at) for at in answer.arrivals]
    spans = [span for row in rows.values() for span in row]
    start, stop = min(span.start for span in spans), max(span.stop for span in spans)
    for name, row in rows.items():
        yield f"{name:<8}|{_bar(row, start, (stop - start) / WIDTH)}| {_said(name, row)}"
    yield f"{'':<8}0{stop - start:>{WIDTH}.2f} s"


def _span(line: LogLine) -> Span:
    return Span(line.at - float(line.fields["seconds"]), line.at)


def _bar(row: Sequence[Span], start: float, seconds_a_mark: float) -> str:
    marks = [" "] * WIDTH
    for span in row:
        first = int((span.start - start) / seconds_a_mark)
        last = int((span.stop - start) / seconds_a_mark)
        for mark in range(min(first, WIDTH - 1), min(last, WIDTH - 1) + 1):
            marks[mark] = "#"
    return "".join(marks)


def _said(name: str, row: Sequence[Span]) -> str:
    if name == "tokens":
        return f"{len(row)}"
    return f"{len(row)} in {sum(span.stop - span.start for span in row):.2f} s"
