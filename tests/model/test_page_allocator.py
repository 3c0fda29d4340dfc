"""Every page has one owner or none, and a request's pages lie together where that is possible."""

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.kimi_linear.page_allocator import PageAllocator

PAGES = 16


def pieces_of(pages: tuple[int, ...]) -> int:
    """Ranges of neighbours that successive pages are."""
    return 1 + sum(after != before + 1 for before, after in pairwise(pages))


class PagesOfRequests(RuleBasedStateMachine):
    """Pages are taken and given back in any order; `free` is what should be left."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.free = set(range(PAGES))
        self.taken: list[tuple[int, ...]] = []

    def free_ranges(self) -> list[int]:
        """Lengths of the ranges of free neighbours, longest first."""
        lengths = [0]
        for page in range(PAGES):
            if page in self.free:
                lengths[-1] += 1
            else:
                lengths.append(0)
        return sorted(lengths, reverse=True)

    def fewest_pieces(self, count: int) -> int:
        """Pieces that a request of so many pages has to be in."""
        ranges = self.free_ranges()
        return next(n for n in range(1, PAGES + 1) if sum(ranges[:n]) >= count)

    @rule(count=st.integers(1, PAGES))
    def take(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(ValueError, match=f"{count} pages are asked for, {len(self.free)}"):
                self.allocator.take(count)
            return
        pieces = self.fewest_pieces(count)
        pages = self.allocator.take(count)
        assert len(pages) == len(set(pages)) == count
        assert self.free.issuperset(pages)
        assert pieces_of(pages) <= pieces
        self.free.difference_update(pages)
        self.taken.append(pages)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        pages = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.allocator.give_back(pages)
        self.free.update(pages)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def give_back_what_is_free(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.free)))
        with pytest.raises(ValueError, match="was not taken"):
            self.allocator.give_back([page])

    @invariant()
    def what_is_not_taken_is_free(self) -> None:
        assert self.allocator.free_count == len(self.free)

    def teardown(self) -> None:
        for pages in self.taken:
            self.allocator.give_back(pages)
        assert self.allocator.take(PAGES) == tuple(range(PAGES)), "all came back, as one range"


PagesOfRequests.TestCase.settings = settings(max_examples=60, deadline=None)
TestPagesOfRequests = PagesOfRequests.TestCase


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
    assert allocator.free_count == 8
