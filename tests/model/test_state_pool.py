"""Room is given to one request at a time, and all of it comes back."""

from math import ceil

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.errors import NoRoomError
from shared.kernels.batch import PAGE_TOKENS, Placement
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

    def teardown(self) -> None:
        for placement in self.placed:
            self.pool.free(placement)
        everything = self.pool.place(PAGES * PAGE_TOKENS)
        assert not self.pool.has_room(1)
        self.pool.free(everything)
        assert {self.pool.place(1).slot for _ in range(SLOTS)} == set(range(SLOTS))


PoolOfRequests.TestCase.settings = settings(max_examples=60, deadline=None)
TestPoolOfRequests = PoolOfRequests.TestCase


def test_a_cleared_slot_is_zero() -> None:
    pool = StatePool(LAYOUT, SLOTS, PAGE_TOKENS, torch.device("cpu"))
    pool.recurrent.fill_(1)
    pool.convolution.fill_(1)
    pool.clear(2)
    assert not pool.recurrent[:, 2].any()
    assert not pool.convolution[:, 2].any()
    assert pool.recurrent[:, [0, 1, 3]].all()
