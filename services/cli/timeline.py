"""Shows where the time of a completion went. Pure: a summary in, lines out."""

from services.cli.completion_stream import CompletionSummary, Usage
from shared.messages import Timings


def timeline(summary: CompletionSummary) -> str:
    """Give a short table: what the system measured, and the first token as it was seen here."""
    rows: list[tuple[str, str]] = []
    if (timings := summary.timings) is not None:
        rows += [
            ("queued", _milliseconds(timings.queued)),
            ("prefill", _milliseconds(timings.prefill)),
            ("transfer", _milliseconds(timings.transfer)),
        ]
    if summary.first_token is not None:
        rows.append(("first token", _milliseconds(summary.first_token)))
    if summary.usage is not None:
        rows.append(("tokens", _tokens(summary.usage, timings)))
    if timings is not None:
        rows.append(("state", _state(timings)))
    if timings is not None and timings.attempts > 1:
        rows.append(("attempts", str(timings.attempts)))
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _milliseconds(value: float) -> str:
    return f"{value:,.1f} ms"


def _tokens(usage: Usage, timings: Timings | None) -> str:
    cached = usage.prompt_tokens_details.cached_tokens
    read = f"{usage.prompt_tokens} read" + (f" ({cached} cached)" if cached else "")
    counts = f"{read}, {usage.completion_tokens} written"
    decoded = usage.completion_tokens - 1  # the first one comes with the prefill
    if timings is None or decoded < 1 or not timings.decode:
        return counts
    return f"{counts}, {1000 * decoded / timings.decode:,.1f} tokens/s"


def _state(timings: Timings) -> str:
    raw, wire = timings.state_raw_bytes, timings.state_wire_bytes
    if not wire:
        return f"{_size(raw)}, none moved"
    return f"{_size(raw)} -> {_size(wire)} on the wire, {raw / wire:.2f}x"


def _size(count: int) -> str:
    if count < 2**20:
        return f"{count / 2**10:,.1f} KiB"
    return f"{count / 2**20:,.1f} MiB"
