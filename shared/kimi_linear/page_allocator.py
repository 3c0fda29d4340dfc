"""Gives out pages of a pool, neighbouring ones together where it can; without torch."""

from collections.abc import Iterable
from typing import Final


class PageAllocator:
    """The free pages of a pool of `count`, as ranges in their order.

    A request gets all its pages at once. First fit: from the first free range that is long enough,
    and when none is, from the longest ones.
    """

    def __init__(self, count: int) -> None:
        self.count: Final = count
        self._free = [range(count)]

    @property
    def free_count(self) -> int:
        """Number of pages that are free."""
        return sum(map(len, self._free))

    def take(self, count: int) -> tuple[int, ...]:
        """Take pages, in the order in which they are to be filled.

        Raises:
            ValueError: fewer are free.
        """
        if count > self.free_count:
            raise ValueError(f"{count} pages are asked for, {self.free_count} are free")
        fitting = [free for free in self._free if len(free) >= count]
        pages: list[int] = []
        for source in fitting[:1] or sorted(self._free, key=len, reverse=True):
            part = source[: count - len(pages)]
            if part:
                pages.extend(part)
                self._free.remove(source)
                self._free.append(source[len(part) :])
        self._free = _joined(self._free)
        return tuple(pages)

    def give_back(self, pages: Iterable[int]) -> None:
        """Make pages free again.

        Raises:
            ValueError: one of them is free already, or not of this pool.
        """
        ordered = sorted(pages)
        returned = [range(page, page + 1) for page in ordered]
        if ordered and (ordered[0] < 0 or ordered[-1] >= self.count):
            raise ValueError(f"the pool has pages 0 to {self.count - 1}")
        self._free = _joined([*self._free, *returned])


def _joined(ranges: Iterable[range]) -> list[range]:
    """Ranges in their order, neighbours in one, without empty ones.

    Raises:
        ValueError: two overlap.
    """
    joined: list[range] = []
    for part in sorted(filter(len, ranges), key=lambda part: part.start):
        if joined and joined[-1].stop > part.start:
            raise ValueError("a page is given back that was not taken")
        if joined and joined[-1].stop == part.start:
            joined[-1] = range(joined[-1].start, part.stop)
        else:
            joined.append(part)
    return joined
