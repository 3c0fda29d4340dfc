"""Memory of this process, as Linux counts it; elsewhere there is nothing to read."""

import re
from pathlib import Path
from typing import Final

from benchmarks.measurement import MemoryUse

_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFERENCES: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"


def reset_peak() -> None:
    """Count the peak from here on."""
    if _CLEAR_REFERENCES.exists():
        _CLEAR_REFERENCES.write_text(_RESET_PEAK)


def memory_use(prompt_tokens: int) -> tuple[MemoryUse, ...]:
    """What is in use after a prefill of that many tokens; empty where the system does not tell."""
    if not _STATUS.exists():
        return ()
    status = _STATUS.read_text()
    use = MemoryUse(
        prompt_tokens=prompt_tokens,
        peak_bytes=_bytes(status, "VmHWM"),
        anonymous_bytes=_bytes(status, "RssAnon"),
    )
    return (use,)


def _bytes(status: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no line {field}")
    return int(found[1]) * 1024
