"""Memory for what stays and is read again and again, weights and states: in huge pages.

A processor has to find out where each page is that it comes to. A decode step comes to all weights
and states once: in pages of 4 KiB that is a quarter of a million for each GB, far more than the
processor remembers until the next step. Linux has pages of 2 MiB for who asks for them
(https://docs.kernel.org/admin-guide/mm/transhuge.html).
"""

import math
import mmap
from contextlib import suppress
from typing import Final

import torch
from torch import Tensor

HUGE_PAGE: Final = 2 * 2**20
"""Bytes; smaller tensors do without."""
ADVICE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)
"""Asks for them, where the system knows of them."""


def empty_in_huge_pages(
    *shape: int, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Make a tensor as `torch.empty` does, on the CPU in huge pages as far as it fills them.

    Its memory is taken page by page as it is written to, and is that of the system's common pages
    where it has no huge ones, or none left.

    Args:
        shape: of the tensor.
        dtype: of its elements.
        device: None is the default one.

    Raises:
        RuntimeError: there is not so much memory.
    """
    device = device or torch.get_default_device()
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if ADVICE is None or device.type != "cpu" or nbytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device=device)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=private)
    except (OSError, OverflowError):  # There is no such room: torch's error says how much it is.
        return torch.empty(shape, dtype=dtype, device=device)
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with suppress(OSError):  # A system that was built without huge pages.
        mapping.madvise(ADVICE, start, nbytes // HUGE_PAGE * HUGE_PAGE)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start).view(shape)
