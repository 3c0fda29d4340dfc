"""A captured step calls the kernels that it called at first, on what is in their memory now."""

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.kernels.cpu.captured_step import CapturedStep
from shared.kernels.cpu.normalization import add_rms_norm, rms_norm
from shared.kernels.cpu.recording import recorded


def test_kernels_are_run_again_and_python_is_not() -> None:
    x = torch.ones(1, 4)
    runs: list[None] = []

    def step() -> Tensor:
        runs.append(None)
        total, _ = add_rms_norm(x, rms_norm(x, torch.ones(4), 0.0), torch.ones(4), 0.0)
        return total

    captured = CapturedStep(step)
    assert captured().tolist() == [[2.0] * 4]
    x.fill_(3)
    assert captured().tolist() == [[4.0] * 4]
    assert len(runs) == 1


def test_a_step_that_fails_is_captured_when_it_does_not() -> None:
    x, outcomes = torch.ones(1, 4), iter([False, True])

    def step() -> Tensor:
        doubled, _ = add_rms_norm(x, x, torch.ones(4), 0.0)
        if not next(outcomes):
            raise ArithmeticError
        return add_rms_norm(doubled, x, torch.ones(4), 0.0)[0]

    captured = CapturedStep(step)
    with pytest.raises(ArithmeticError):
        captured()
    assert captured().tolist() == captured().tolist() == [[3.0] * 4]


def test_what_another_thread_computes_meanwhile_is_not_captured() -> None:
    x, other = torch.ones(1, 4), torch.ones(1, 4)

    def compute_other() -> None:
        total, _ = add_rms_norm(other, other, torch.ones(4), 0.0)
        other.copy_(total)

    def step() -> Tensor:
        thread = threading.Thread(target=compute_other)
        thread.start()
        thread.join()
        return rms_norm(x, torch.ones(4), 0.0)

    captured = CapturedStep(step)
    captured()
    captured()
    assert other.tolist() == [[2.0] * 4]


def test_results_that_nothing_needs_any_more_give_their_memory_to_later_ones() -> None:
    x, weight = torch.ones(2, 40), torch.ones(40)

    def step() -> Tensor:
        total = x
        for _ in range(50):
            normalised = rms_norm(total, weight, 0.0)
            total, _ = add_rms_norm(total, normalised, weight, 0.0)
        return total

    with recorded() as recording:
        expected = step()
    captured = CapturedStep(step)
    assert torch.equal(captured(), expected)
    x.fill_(7)
    assert torch.equal(captured(), step()), "each run begins from what is there then"
    assert len(recording.calls) == 100
    arrays = [a for _, arguments in recording.calls for a in arguments if isinstance(a, np.ndarray)]
    places = {array.ctypes.data for array in arrays} - {x.data_ptr(), weight.data_ptr()}
    assert len(places) <= 6, "of one round and the one before"


def test_a_result_that_is_still_needed_keeps_its_memory() -> None:
    x, weight = torch.rand(3, 8), torch.ones(8)

    def step() -> Tensor:
        normalised = [rms_norm(x, weight, epsilon) for epsilon in (0.0, 1.0, 9.0)]
        halves = [one[:, :4] for one in normalised]  # views keep the whole
        del normalised
        total, _ = add_rms_norm(halves[0], halves[1], weight[:4], 0.0)
        return add_rms_norm(total, halves[2], weight[:4], 0.0)[0]

    captured = CapturedStep(step)
    captured()
    x.copy_(torch.rand(3, 8))
    assert torch.equal(captured(), step())
