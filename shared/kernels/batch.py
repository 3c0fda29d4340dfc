"""Which tokens are computed together, and where the states of their requests lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Self

import torch
from torch import Tensor

PAGE_TOKENS: Final = 64
"""Latents in a page: what a request is given at a time."""

CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """Where the state of one request lies in the pool, for as long as it lives.

    Attributes:
        slot: row of its KDA states.
        pages: that hold its latents, in the order of its tokens.
    """

    slot: int
    pages: tuple[int, ...]

    @cached_property
    def extents(self) -> tuple[range, ...]:
        """Rows of the latent pool in the order of the request's tokens, in as few ranges as do.

        Neighbouring pages are one range, so that what reads them reads large pieces.
        """
        extents: list[range] = []
        for page in self.pages:
            rows = range(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
            if extents and extents[-1].stop == rows.start:
                extents[-1] = range(extents[-1].start, rows.stop)
            else:
                extents.append(rows)
        return tuple(extents)

    def table_row(self, width: int) -> tuple[int, ...]:
        """The pages as a row of a page table."""
        return self.pages + (0,) * (width - len(self.pages))

    def split(self, start: int, stop: int) -> list[tuple[slice, slice]]:
        """Where tokens [start, stop) of the request are.

        Returns:
            Rows of the latent pool, and which of these tokens, counted from `start`, are there.
        """
        found: list[tuple[slice, slice]] = []
        first = -start
        for extent in self.extents:
            rows = extent[max(0, -first) : max(0, stop - start - first)]
            if rows:
                token = max(0, first)
                found.append((slice(rows.start, rows.stop), slice(token, token + len(rows))))
            first += len(extent)
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """The successive tokens of one request in a batch: its rows are [start, stop)."""

    start: int
    stop: int
    seen: int
    """Tokens of the request before these."""
    placement: Placement

    @property
    def tokens(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @property
    def length(self) -> int:
        """Tokens of the request, with these."""
        return self.seen + self.tokens

    @property
    def first_row(self) -> int:
        """Row of the latent pool for the latent of the first of these tokens."""
        page = self.placement.pages[self.seen // PAGE_TOKENS]
        return page * PAGE_TOKENS + self.seen % PAGE_TOKENS


class Batch:
    """Tokens of R requests, those of one after those of the other: T rows without any padding.

    Its tensors are made once, on the device that computes.

    Attributes:
        parts: the tokens of each request.
    """

    def __init__(self, parts: tuple[Part, ...], device: torch.device = CPU) -> None:
        self.parts = parts
        self._device = device

    @classmethod
    def pack(
        cls,
        counts: Sequence[int],
        seen: Sequence[int],
        where: Sequence[Placement],
        device: torch.device = CPU,
    ) -> Self:
        """Put the next `counts[r]` tokens of each request r, which has seen `seen[r]`, together."""
        parts = []
        start = 0
        for count, before, placement in zip(counts, seen, where, strict=True):
            parts.append(Part(start, start + count, before, placement))
            start += count
        return cls(tuple(parts), device)

    @property
    def rows(self) -> int:
        """T."""
        return self.parts[-1].stop

    @property
    def is_decode(self) -> bool:
        """Whether every request has exactly one token."""
        return self.rows == len(self.parts)

    @property
    def longest(self) -> int:
        """Most tokens of a request, with those of the batch."""
        return max(part.length for part in self.parts)

    @cached_property
    def slots(self) -> Tensor:
        """Rows of the KDA states, `[R]`, int64."""
        slots = [part.placement.slot for part in self.parts]
        return torch.tensor(slots, device=self._device)

    @cached_property
    def bounds(self) -> Tensor:
        """Rows of request r are [bounds[r], bounds[r + 1]): `[R + 1]`, int32."""
        bounds = [0, *(part.stop for part in self.parts)]
        return torch.tensor(bounds, dtype=torch.int32, device=self._device)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each request, with those of the batch, `[R]`, int32."""
        lengths = [part.length for part in self.parts]
        return torch.tensor(lengths, dtype=torch.int32, device=self._device)

    @cached_property
    def page_table(self) -> Tensor:
        """Pages of each request in the order of its tokens, `[R, most pages]`, int32."""
        most = max(len(part.placement.pages) for part in self.parts)
        pages = [part.placement.table_row(most) for part in self.parts]
        return torch.tensor(pages, dtype=torch.int32, device=self._device)

    @cached_property
    def latent_rows(self) -> Tensor:
        """Rows of the latent pool for the latents of the batch's tokens, `[T]`, int64."""
        if self.is_decode:
            return torch.tensor([part.first_row for part in self.parts], device=self._device)
        return torch.cat(
            [
                torch.arange(rows.start, rows.stop, device=self._device)
                for part in self.parts
                for rows, _ in part.placement.split(part.seen, part.length)
            ]
        )
