"""How the C library treats memory that operations free."""

import ctypes
import platform
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
KEPT_BYTES: Final = 256 * 2**20
_LARGEST_BLOCK: Final = 32 * 2**20
"""The most that glibc allows."""


def keep_freed_memory(kept_bytes: int = KEPT_BYTES) -> None:
    """Give back what is free now, and from now on keep up to `kept_bytes` of what is freed.

    Every operation allocates its result. glibc asks the system anew for each large one, which then
    clears it page by page: measured, a tenth of the time of a prefill. Other C libraries are left
    as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, kept_bytes)
