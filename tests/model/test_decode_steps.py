"""A decode step that is run again computes just what it does when it is run for the first time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from shared.kernels.dispatch import kernels_for
from shared.kernels.dtypes import WeightDType
from shared.kernels.interface import Kernels, as_it_is
from shared.kimi_linear import engine as engine_module
from shared.kimi_linear.decode_steps import KEPT_STEPS
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.presets import write_random_checkpoint
from shared.kimi_linear.request_state import RequestState

Decode = Callable[[list[int], list[RequestState]], Tensor]

ROOM = Room(slots=16, tokens=4096)


@pytest.fixture(scope="module")
def whole_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that matrix units take."""
    directory = tmp_path_factory.mktemp("whole-tiles")
    write_random_checkpoint(directory, "tiny")
    return directory


@pytest.fixture(params=get_args(WeightDType))
def dtype(request: pytest.FixtureRequest) -> WeightDType:
    width: WeightDType = request.param
    return width


@pytest.fixture(params=["reference_directory", "whole_tiles"])
def directory(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def engines(
    directory: Path, dtype: WeightDType, monkeypatch: pytest.MonkeyPatch
) -> tuple[Engine, Engine]:
    """One that captures its steps, and one that runs them as they are written."""

    def uncaptured(device: str, dtype: WeightDType) -> Kernels:
        return replace(kernels_for(device, dtype), captured=as_it_is)

    captured = Engine.load(directory, dtype, room=ROOM)
    monkeypatch.setattr(engine_module, "kernels_for", uncaptured)
    return captured, Engine.load(directory, dtype, room=ROOM)


def begun(engine: Engine, states: ExitStack, lengths: list[int]) -> list[RequestState]:
    found = [states.enter_context(engine.new_state(length + 100)) for length in lengths]
    engine.prefill([[(31 * n + length) % 300 for n in range(length)] for length in lengths], found)
    return found


def test_requests_that_come_go_and_change_places_get_the_same_bits(
    engines: tuple[Engine, Engine],
) -> None:
    """Batches of the same size are of other requests, in other pages, in another order."""

    def logits(engine: Engine) -> list[Tensor]:
        found = []
        with ExitStack() as staying:
            first, second, third = begun(engine, staying, [5, 63, 200])
            for step in range(4):
                found.append(engine.decode([step, 7], [first, second]))
                found.append(engine.decode([9, step], [second, third]))
                with ExitStack() as leaving:
                    (guest,) = begun(engine, leaving, [70 * step + 1])
                    found.append(engine.decode([3, step], [guest, first]))
                    found.append(engine.decode([step], [guest]))
            found.append(torch.stack([state.snapshot().recurrent for state in (first, second)]))
            found.append(third.export_latents(0, third.length))
        return found

    captured, written = map(logits, engines)
    assert all(map(torch.equal, captured, written))


def test_logits_stay_what_they_are_when_the_next_step_runs(engine: Engine) -> None:
    with engine.new_state(10) as state:
        engine.decode([1], [state])
        logits = engine.decode([2], [state])
        copy = logits.clone()
        engine.decode([3], [state])
        assert torch.equal(logits, copy)


def test_only_so_many_sizes_are_kept_and_all_are_right(engine: Engine) -> None:
    sizes = list(range(1, KEPT_STEPS + 3))

    def logits() -> Iterator[Tensor]:
        for size in sizes + sizes[::-1]:
            with ExitStack() as states:
                found = [states.enter_context(engine.new_state(10)) for _ in range(size)]
                engine.decode([5] * size, found)
                yield engine.decode([6] * size, found)

    alone, *others = logits()
    assert all(torch.equal(row, alone[0]) for batch in others for row in batch)
    assert len(engine._decode_steps._kept) == KEPT_STEPS


def test_more_threads_may_compute_from_one_step_to_the_next(engine: Engine) -> None:
    threads = torch.get_num_threads()
    with engine.new_state(10) as state, engine.new_state(10) as other:
        try:
            found = []
            for count in (1, 2, 1):
                torch.set_num_threads(count)
                found.append(engine.decode([1], [state]))
            torch.set_num_threads(threads)
            assert all(torch.equal(engine.decode([1], [other]), logits) for logits in found)
        finally:
            torch.set_num_threads(threads)
