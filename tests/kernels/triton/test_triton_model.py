"""The whole model through the Triton kernels gives the reference's numbers and text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from shared.errors import UnsupportedDeviceError
from shared.kernels.triton.kernels import triton_kernels
from shared.kimi_linear.checkpoint import load_weights
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.model import KimiLinear
from shared.kimi_linear.state_pool import StatePool

REFERENCE = Path(__file__).parents[2] / "reference" / "kimi_linear_small"
LENGTHS = [65, 2]
STEPS = 2


def engine_in(dtype: Literal["float32", "bfloat16"], device: str) -> Engine:
    """An engine on the GPU or, without one, with kernels in the interpreter on the CPU."""
    config = KimiLinearConfig.from_directory(REFERENCE)
    kernels = triton_kernels(dtype)
    with torch.inference_mode(), torch.device(device):
        model = KimiLinear(load_weights(REFERENCE, config, kernels), config, kernels)
    pool = StatePool(config.state_layout(dtype), 4, 1024, torch.device(device))
    return Engine(model, config, "reference", dtype, pool)


@pytest.fixture(scope="module")
def reference() -> Iterator[dict[str, np.ndarray]]:
    with np.load(REFERENCE / "reference.npz") as arrays:
        yield dict(arrays)


def test_packed_prompts_and_a_batch_of_steps_are_the_references(
    reference: dict[str, np.ndarray], device: str
) -> None:
    engine = engine_in("float32", device)
    states = [engine.new_state(length + STEPS) for length in LENGTHS]
    logits = engine.prefill([reference[f"tokens_{length}"].tolist() for length in LENGTHS], states)
    texts: list[list[int]] = [[] for _ in LENGTHS]
    for step in range(STEPS):
        for row, length in enumerate(LENGTHS):
            texts[row].append(int(logits[row].argmax()))
            if not step:
                expected = torch.from_numpy(reference[f"logits_{length}"][-1])
                torch.testing.assert_close(logits[row].cpu(), expected, rtol=0, atol=2e-3)
        logits = engine.decode([text[-1] for text in texts], states)
    assert texts == [reference[f"greedy_{length}"][:STEPS].tolist() for length in LENGTHS]


def test_bf16_gives_the_references_logits_up_to_its_rounding(
    reference: dict[str, np.ndarray], device: str
) -> None:
    engine = engine_in("bfloat16", device)
    prompt = reference["tokens_2"].tolist()
    prefilled = engine.prefill([prompt], [engine.new_state(len(prompt))])
    state = engine.new_state(len(prompt))
    decoded = [engine.decode([token], [state]) for token in prompt]
    expected = torch.from_numpy(reference["logits_2"])
    for logits, exact in zip(
        (prefilled, *decoded), (expected[1], expected[0], expected[1]), strict=True
    ):
        assert (logits[0].cpu() - exact).norm() < 0.1 * exact.norm()


def test_int8_weights_are_not_for_a_gpu() -> None:
    with pytest.raises(UnsupportedDeviceError, match="for CPUs"):
        triton_kernels("int8")
