"""A captured step calls the kernels that it called at first, on what is in their memory now."""

import threading

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kernels.cpu.captured_step import CapturedStep
from shared.kernels.cpu.compiled import kernel
from shared.kernels.cpu.native_calls import CallSequence
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


def test_parts_of_wider_arrays_are_given_with_their_gaps() -> None:
    wide, weight = torch.rand(3, 24), torch.rand(8)

    def step() -> Tensor:
        return rms_norm(wide[:, 8:16], weight, 0.5)

    captured = CapturedStep(step)
    captured()
    wide.copy_(torch.rand(3, 24))
    assert torch.equal(captured(), step())


# --- calls that cannot be made -----------------------------------------------------------------


@kernel
def _need_memory(elements: NDArray[np.int64], done: NDArray[np.int64]) -> None:
    room = np.zeros(elements[0], np.uint8)
    done[0] += room.shape[0]


def test_a_kernel_that_gets_no_memory_fails_the_step_and_those_behind_it_are_not_run() -> None:
    elements, done, behind = (np.array([n]) for n in (1, 0, 0))
    with recorded() as recording:
        _need_memory(elements, done)
        _need_memory(np.array([1]), behind)
    calls = CallSequence(recording.calls)
    calls.run()
    elements[0] = 2**60
    with pytest.raises(MemoryError, match="_need_memory"):
        calls.run()
    assert (done[0], behind[0]) == (2, 2)
    elements[0] = 1
    calls.run()
    assert (done[0], behind[0]) == (3, 3), "it goes on when there is memory again"


def test_only_arguments_that_the_machine_code_takes_are_passed_to_it() -> None:
    with recorded() as recording:
        _need_memory(np.array([1]), np.array([0]))
    ((code, arguments),) = recording.calls
    with pytest.raises(TypeError, match="takes no str"):
        CallSequence([(code, (*arguments, "text"))])
    with pytest.raises(TypeError, match=r"takes 14 words, not 7"):
        CallSequence([(code, arguments[:1])])


def test_no_calls_are_no_work() -> None:
    CallSequence([]).run()
