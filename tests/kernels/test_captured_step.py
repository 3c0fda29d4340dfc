"""A captured step calls the kernels that it called at first, on what is in their memory now."""

import threading

import pytest
import torch
from torch import Tensor

from shared.kernels.cpu.captured_step import CapturedStep
from shared.kernels.cpu.normalization import add_rms_norm, rms_norm


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
