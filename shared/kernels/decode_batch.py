"""The batch of a decode step in tensors that stay where they are from step to step."""

from collections.abc import Sequence

import torch

from shared.kernels.batch import CPU, Batch, Part, Placement


class DecodeBatch(Batch):
    """The next token of each of R requests: others at every step, in the same tensors.

    It is a batch once `take` has told it of which requests.
    """

    def __init__(self, requests: int, most_pages: int, device: torch.device = CPU) -> None:
        super().__init__((), device)
        self._where: list[Placement | None] = [None] * requests
        self.slots = torch.zeros(requests, dtype=torch.int64, device=device)
        self.bounds = torch.arange(requests + 1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(requests, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(requests, most_pages, dtype=torch.int32, device=device)
        self.latent_rows = torch.zeros(requests, dtype=torch.int64, device=device)

    def take(self, seen: Sequence[int], where: Sequence[Placement]) -> None:
        """Be the next token of each request r, which has seen `seen[r]`."""
        self.parts = tuple(
            Part(row, row + 1, before, placement)
            for row, (before, placement) in enumerate(zip(seen, where, strict=True))
        )
        moved = [row for row, placement in enumerate(where) if placement is not self._where[row]]
        if moved:  # a request stays where it is for as long as it lives
            width = self.page_table.shape[1]
            pages = [where[row].table_row(width) for row in moved]
            self.page_table[moved] = torch.tensor(pages, dtype=torch.int32).to(self._device)
            self.slots.copy_(torch.tensor([placement.slot for placement in where]))
            self._where[:] = where  # last: what fails before is done again
        self.lengths.copy_(torch.tensor([part.length for part in self.parts]))
        self.latent_rows.copy_(torch.tensor([part.first_row for part in self.parts]))
