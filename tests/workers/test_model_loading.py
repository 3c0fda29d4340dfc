"""A worker says in its log how far the loading of its model is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import LogCapture

from shared.compute_thread import ComputeThread
from shared.kimi_linear.presets import write_random_checkpoint
from shared.model_loading import load_engine
from shared.observability.progress_log import ProgressLog
from shared.settings import PrefillWorkerSettings

MIB = 2**20


@pytest.fixture
def lines() -> Iterator[LogCapture]:
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, capture])
    yield capture
    structlog.configure(**before)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_line_comes_every_five_seconds_and_at_the_end(lines: LogCapture) -> None:
    clock = Clock()
    progress = ProgressLog("loading model", clock)
    for second in range(13):
        clock.now = 1000.0 + second
        progress(second * MIB, 12 * MIB)
    assert [(line["seconds"], line["percent"]) for line in lines.entries] == [
        (5.0, 41),
        (10.0, 83),
        (12.0, 100),
    ]
    assert lines.entries[0] == {
        "event": "loading model",
        "log_level": "info",
        "percent": 41,
        "read_bytes": 5 * MIB,
        "total_bytes": 12 * MIB,
        "seconds": 5.0,
    }


def test_time_begins_with_the_first_call(lines: LogCapture) -> None:
    clock = Clock()
    progress = ProgressLog("hashing model", clock)
    clock.now += 100
    progress(0, MIB)
    clock.now += 0.25
    progress(MIB, MIB)
    assert [line["seconds"] for line in lines.entries] == [0.2]


def test_nothing_to_read_is_done_at_once(lines: LogCapture) -> None:
    ProgressLog("hashing model", Clock())(0, 0)
    assert [line["percent"] for line in lines.entries] == [100]


@pytest.mark.asyncio
async def test_a_worker_logs_loading_and_hashing_under_its_own_name(
    lines: LogCapture, tmp_path: Path, compute: ComputeThread
) -> None:
    write_random_checkpoint(tmp_path / "model", "tiny")
    settings = PrefillWorkerSettings(model=tmp_path / "model", cache=tmp_path / "cache")
    with structlog.contextvars.bound_contextvars(identity="prefill-1"):
        engine = await load_engine(settings, compute, slots=2)
    assert [line["event"] for line in lines.entries] == [
        "loading model",
        "hashing model",
        "warming up",
        "model loaded",
    ]
    assert {line["identity"] for line in lines.entries} == {"prefill-1"}
    assert lines.entries[-1]["fingerprint"] == engine.fingerprint


@pytest.mark.asyncio
async def test_a_worker_without_a_cache_loads_all_the_same(
    lines: LogCapture, tmp_path: Path, compute: ComputeThread
) -> None:
    write_random_checkpoint(tmp_path / "model", "tiny")
    settings = PrefillWorkerSettings(model=tmp_path / "model", cache=None)
    assert (await load_engine(settings, compute, slots=2)).fingerprint
    assert "hashing model" in [line["event"] for line in lines.entries]
