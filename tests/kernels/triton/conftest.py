"""Where the Triton kernels run: on the CUDA device, or in Triton's interpreter without one."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests.kernels.triton.tensor_cores import products_as_on_tensor_cores

# `triton.jit` decides by this variable whether a function is compiled or interpreted, at the moment
# it decorates. So it is set here, before any test module imports a kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
"""Triton has wheels for Linux only."""


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def products_of_a_gpu(device: str) -> Iterator[None]:
    if device == "cuda":
        yield
    else:
        with products_as_on_tensor_cores():
            yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
