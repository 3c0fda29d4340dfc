"""Batches of requests whose states lie scattered over a pool."""

import random
from collections.abc import Sequence

from shared.kernels.batch import PAGE_TOKENS, Batch, Placement

SLOTS = 6
PAGES = 40
ROWS = PAGES * PAGE_TOKENS


def scattered(counts: Sequence[int], seen: Sequence[int] | None = None, seed: int = 0) -> Batch:
    """The next `counts[r]` tokens of requests in slots and pages of no order at all."""
    seen = [0] * len(counts) if seen is None else seen
    generator = random.Random(seed)
    slots = generator.sample(range(SLOTS), len(counts))
    pages = generator.sample(range(PAGES), PAGES)
    where = []
    for slot, count, before in zip(slots, counts, seen, strict=True):
        needed = -(-(count + before) // PAGE_TOKENS)
        where.append(Placement(slot, tuple(pages[:needed])))
        pages = pages[needed:]
    return Batch.pack(counts, seen, where)


def other_slots(batch: Batch) -> list[int]:
    """Slots that are not of this batch."""
    own = {part.placement.slot for part in batch.parts}
    return [slot for slot in range(SLOTS) if slot not in own]
