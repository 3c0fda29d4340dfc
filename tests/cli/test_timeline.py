from services.cli.completion_stream import CompletionSummary, PromptTokensDetails, Usage
from services.cli.timeline import timeline
from shared.messages import Timings

TIMINGS = Timings(
    queued=0.5,
    prefill=1234.5,
    transfer=3,
    decode=100,
    state_raw_bytes=2048,
    state_wire_bytes=1024,
    attempts=2,
)


def test_every_part_has_its_line() -> None:
    summary = CompletionSummary(1300, Usage(prompt_tokens=9, completion_tokens=11), TIMINGS)
    assert timeline(summary).splitlines() == [
        "queued       0.5 ms",
        "prefill      1,234.5 ms",
        "transfer     3.0 ms",
        "first token  1,300.0 ms",
        "tokens       9 read, 11 written, 100.0 tokens/s",
        "state        2.0 KiB -> 1.0 KiB on the wire, 2.00x",
        "attempts     2",
    ]


def test_a_single_token_has_no_rate() -> None:
    summary = CompletionSummary(1, Usage(prompt_tokens=9, completion_tokens=1), TIMINGS)
    assert "tokens       9 read, 1 written" in timeline(summary).splitlines()


def test_cached_tokens_are_named_where_there_are_any() -> None:
    details = PromptTokensDetails(cached_tokens=4)
    usage = Usage(prompt_tokens=9, completion_tokens=1, prompt_tokens_details=details)
    lines = timeline(CompletionSummary(1, usage, TIMINGS)).splitlines()
    assert "tokens       9 read (4 cached), 1 written" in lines


def test_a_state_that_did_not_move_has_no_ratio() -> None:
    timings = TIMINGS.model_copy(update={"state_wire_bytes": 0})
    assert "state        2.0 KiB, none moved" in timeline(CompletionSummary(1, None, timings))


def test_a_server_without_timings_leaves_what_was_measured_here() -> None:
    assert timeline(CompletionSummary(12.34, None, None)) == "first token  12.3 ms"
