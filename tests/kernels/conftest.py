"""What all kernel tests run with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_the_same_random_numbers_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
