"""The reference checkpoint, what another implementation computed with it, and copies of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState

Arrays = dict[str, NDArray[Any]]
Greedy = Callable[[Tensor, RequestState, int], list[int]]
WriteCheckpoint = Callable[[dict[str, Tensor], dict[str, Any]], Path]


@pytest.fixture(scope="session")
def reference_directory() -> Path:
    return Path(__file__).parents[1] / "reference" / "kimi_linear_small"


@pytest.fixture(scope="session")
def reference(reference_directory: Path) -> Arrays:
    with np.load(reference_directory / "reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def engine(reference_directory: Path) -> Engine:
    return Engine.load(reference_directory, "float32", threads=1)


@pytest.fixture(scope="session")
def greedy(engine: Engine) -> Greedy:
    """Continue with the most likely tokens, after logits `[vocabulary]` and the state they left."""

    def decode(logits: Tensor, state: RequestState, count: int) -> list[int]:
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(int(logits.argmax()))
            logits = engine.decode([tokens[-1]], [state])[0]
        return tokens

    return decode


@pytest.fixture
def reference_tensors(reference_directory: Path) -> dict[str, Tensor]:
    """The reference weights, to be changed at will."""
    return load_file(reference_directory / "model.safetensors")


@pytest.fixture
def reference_config(reference_directory: Path) -> dict[str, Any]:
    """The reference configuration, to be changed at will."""
    config: dict[str, Any] = json.loads((reference_directory / "config.json").read_text())
    return config


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """Write weights and a configuration to a model directory."""

    def write(tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def one_thread_and_the_same_random_numbers_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
