"""Room for the states of all requests of an engine: made once, never moved."""

import heapq
from collections.abc import Callable
from math import ceil
from threading import RLock

import torch

from shared.errors import NoRoomError
from shared.kernels.batch import PAGE_TOKENS, Placement
from shared.kernels.huge_pages import empty_in_huge_pages
from shared.kernels.torch_dtypes import TORCH_DTYPES
from shared.kimi_linear.page_allocator import PageAllocator
from shared.kimi_linear.state_layout import StateLayout


class StatePool:
    """KDA states in slots, one a request, and MLA latents in pages.

    A request is given a slot and all the pages that it may come to need at its beginning, so that
    nothing has to be found, moved or taken away while it runs. Memory of the CPU that no request
    has used yet is reserved, not taken. Room is given and taken back from any thread.

    Attributes:
        layout: of the states.
        tokens: that all requests together have room for.
        recurrent: `[kda_layers, slots, heads, K, V]`.
        convolution: `[kda_layers, slots, taps, 3 * heads * K]`, oldest input first: the snapshot's
            transposed, so that an input is one row, as it is among the activations.
        latents: `[mla_layers, pages * PAGE_TOKENS, latent_dim]`.
        lock: held while room is given or taken back.
    """

    def __init__(self, layout: StateLayout, slots: int, tokens: int, device: torch.device) -> None:
        pages = ceil(tokens / PAGE_TOKENS)
        self.layout = layout
        self.tokens = pages * PAGE_TOKENS
        self.recurrent = empty_in_huge_pages(
            layout.kda_layers,
            slots,
            *layout.recurrent_shape[1:],
            dtype=TORCH_DTYPES[layout.recurrent_dtype],
            device=device,
        )
        self.convolution = empty_in_huge_pages(
            layout.kda_layers,
            slots,
            layout.convolution_taps,
            layout.convolution_channels,
            dtype=TORCH_DTYPES[layout.convolution_dtype],
            device=device,
        )
        self.latents = empty_in_huge_pages(
            *layout.latents_shape(self.tokens),
            dtype=TORCH_DTYPES[layout.latent_dtype],
            device=device,
        )
        self.lock = RLock()
        self._free_slots = list(range(slots))
        self._pages = PageAllocator(pages)
        self._watchers: list[Callable[[], object]] = []

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self.latents.device

    def has_room(self, tokens: int) -> bool:
        """Whether a request of so many tokens could be placed now."""
        with self.lock:
            return bool(self._free_slots) and ceil(tokens / PAGE_TOKENS) <= self._pages.free_count

    def watch(self, freed: Callable[[], object]) -> None:
        """Have `freed` called, in whatever thread, each time that room has become free."""
        self._watchers.append(freed)

    def place(self, tokens: int) -> Placement:
        """Give a request a slot and pages for so many tokens.

        Raises:
            NoRoomError: there are no slot and pages free for it.
        """
        with self.lock:
            if not self.has_room(tokens):
                raise NoRoomError(
                    f"no room for {tokens} tokens: {len(self._free_slots)} slots and "
                    f"{self._pages.free_count * PAGE_TOKENS} of {self.tokens} tokens are free"
                )
            slot = heapq.heappop(self._free_slots)
            pages = self._pages.take(ceil(tokens / PAGE_TOKENS))
        return Placement(slot, pages)

    def clear(self, slot: int) -> None:
        """Set the KDA states of a slot to those before the first token."""
        self.recurrent[:, slot] = 0
        self.convolution[:, slot] = 0

    def free(self, placement: Placement) -> None:
        """Take back what `place` gave."""
        with self.lock:
            self._pages.give_back(placement.pages)
            heapq.heappush(self._free_slots, placement.slot)
        for freed in self._watchers:
            freed()
