"""Room is given to one request at a time, and all of it comes back."""

from math import ceil

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.errors import NoRoomError
from shared.kernels.batch import PAGE_TOKENS, Placement
from shared.kimi_linear.page_allocator import PageAllocator
from shared.kimi_linear.state_layout import StateLayout
from shared.kimi_linear.state_pool import StatePool

SLOTS, PAGES = 4, 12
LAYOUT = StateLayout(
    kda_layers=1,
    kda_heads=1,
    kda_head_dim=2,
    convolution_taps=3,
    mla_layers=1,
    latent_dim=4,
    latent_dtype="float32",
    convolution_dtype="float32",
)


class PoolOfRequests(RuleBasedStateMachine):
    """Requests come and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.freed = 0
        self.pool = StatePool(LAYOUT, SLOTS, PAGES * PAGE_TOKENS, torch.device("cpu"))
        self.pool.watch(self.count_freed)
        self.placed: list[Placement] = []

    def count_freed(self) -> None:
        self.freed += 1

    @rule(tokens=st.integers(1, PAGES * PAGE_TOKENS))
    def come(self, tokens: int) -> None:
        needed = ceil(tokens / PAGE_TOKENS)
        fits = len(self.placed) < SLOTS and needed <= PAGES - self.taken_pages()
        assert self.pool.has_room(tokens) == fits
        if not fits:
            with pytest.raises(NoRoomError, match=f"no room for {tokens} tokens"):
                self.pool.place(tokens)
            return
        placement = self.pool.place(tokens)
        assert len(placement.pages) == needed
        self.placed.append(placement)

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        before = self.freed
        self.pool.free(self.placed.pop(data.draw(st.integers(0, len(self.placed) - 1))))
        assert self.freed == before + 1

    @invariant()
    def nothing_has_two_owners(self) -> None:
        pages = [page for placement in self.placed for page in placement.pages]
        slots = [placement.slot for placement in self.placed]
        assert len(set(pages)) == len(pages)
        assert len(set(slots)) == len(slots)
        assert all(0 <= page < PAGES for page in pages)
        assert all(0 <= slot < SLOTS for slot in slots)

    def taken_pages(self) -> int:
        return sum(len(placement.pages) for placement in self.placed)


PoolOfRequests.TestCase.settings = settings(max_examples=60, deadline=None)
TestPoolOfRequests = PoolOfRequests.TestCase


def test_the_first_range_that_is_long_enough_is_taken() -> None:
    allocator = PageAllocator(10)
    taken = [allocator.take(2) for _ in range(5)]
    allocator.give_back(taken[0])
    allocator.give_back((*taken[2], *taken[3]))
    assert allocator.take(3) == (4, 5, 6)
    assert allocator.take(2) == (0, 1)


def test_scattered_pages_serve_when_no_range_is_long_enough() -> None:
    allocator = PageAllocator(6)
    taken = [allocator.take(1) for _ in range(6)]
    for (page,) in (taken[0], taken[2], taken[3]):
        allocator.give_back([page])
    assert allocator.take(3) == (2, 3, 0)
    assert allocator.free_count == 0


@pytest.mark.parametrize("pages", [(3,), (1, 1), (-1,), (10,)])
def test_pages_that_were_not_taken_cannot_be_given_back(pages: tuple[int, ...]) -> None:
    allocator = PageAllocator(10)
    allocator.take(2)
    with pytest.raises(ValueError, match=r"not taken|pages 0 to 9"):
        allocator.give_back(pages)


def test_a_cleared_slot_is_zero() -> None:
    pool = StatePool(LAYOUT, SLOTS, PAGE_TOKENS, torch.device("cpu"))
    pool.recurrent.fill_(1)
    pool.convolution.fill_(1)
    pool.clear(2)
    assert not pool.recurrent[:, 2].any()
    assert not pool.convolution[:, 2].any()
    assert pool.recurrent[:, [0, 1, 3]].all()
