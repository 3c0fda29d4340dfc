"""Weights and states lie in huge pages where Linux has them, and otherwise are tensors as any."""

import math
from pathlib import Path

import pytest
import torch

from shared.kernels.huge_pages import ADVICE, HUGE_PAGE, empty_in_huge_pages

ELEMENTS = HUGE_PAGE // 4
"""Of fp32, in a page."""

with_huge_pages = pytest.mark.skipif(
    ADVICE is None or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="the system has no huge pages",
)


def mapping_of(address: int) -> dict[str, str]:
    """What the system says of the mapping that an address is in; nothing if it is in none."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if "-" in line.split()[0]:
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            inside = first <= address < last
        elif inside:
            found[name] = value.strip()
    return found


@pytest.mark.parametrize("shape", [(3,), (0, 4), (5, ELEMENTS), (2, 3, ELEMENTS + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_it_is_a_tensor_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = empty_in_huge_pages(*shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    tensor.fill_(3)
    assert bool((tensor == 3).all())


def test_a_device_with_memory_of_its_own_has_its_own_pages() -> None:
    with torch.device("meta"):
        assert empty_in_huge_pages(2, ELEMENTS, dtype=torch.float32).device.type == "meta"
    there = empty_in_huge_pages(2, ELEMENTS, dtype=torch.float32, device=torch.device("meta"))
    assert there.device.type == "meta"


@pytest.mark.parametrize("shape", [(2**50,), (2**31, 2**31)])
def test_too_large_a_tensor_is_refused_with_its_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=str(math.prod(shape))):
        empty_in_huge_pages(*shape, dtype=torch.int8)


@with_huge_pages
def test_a_large_tensor_begins_with_a_page_and_asks_for_huge_ones() -> None:
    tensor = empty_in_huge_pages(3, ELEMENTS, dtype=torch.float32)
    assert tensor.data_ptr() % HUGE_PAGE == 0
    assert "hg" in mapping_of(tensor.data_ptr())["VmFlags"].split()


@with_huge_pages
def test_memory_is_not_taken_before_it_is_used() -> None:
    tensor = empty_in_huge_pages(64, ELEMENTS, dtype=torch.float32)
    tensor[0, 0] = 1
    assert int(mapping_of(tensor.data_ptr())["Rss"].split()[0]) * 1024 <= HUGE_PAGE


@with_huge_pages
def test_the_end_that_fills_no_huge_page_takes_common_ones() -> None:
    tensor = empty_in_huge_pages(ELEMENTS + 1, dtype=torch.float32)
    tensor[-1] = 1
    assert "hg" not in mapping_of(tensor.data_ptr() + HUGE_PAGE)["VmFlags"].split()


@with_huge_pages
def test_memory_is_given_back_with_the_last_tensor_that_shows_it() -> None:
    tensor = empty_in_huge_pages(64, ELEMENTS, dtype=torch.float32)
    address, part = tensor.data_ptr(), tensor[1:].view(-1)
    del tensor
    assert "hg" in mapping_of(address)["VmFlags"].split()
    del part
    assert "hg" not in mapping_of(address).get("VmFlags", "").split()
