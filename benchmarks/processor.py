"""The processor that a measurement belongs to."""

import platform
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

_CPU_INFO: Final = Path("/proc/cpuinfo")
_INSTRUCTION_SETS: Final = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
    "i8mm": "I8MM",
}
"""The flags that decide how fast products of matrices are, and their usual names."""


class Processor(BaseModel):
    """Its name and what it can do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    instruction_sets: tuple[str, ...]

    @classmethod
    def of_this_machine(cls) -> "Processor":
        """From the system's description; without it, the architecture's name alone."""
        if not _CPU_INFO.exists():
            return cls(name=platform.processor() or platform.machine(), instruction_sets=())
        return parse_cpu_info(_CPU_INFO.read_text())

    def __str__(self) -> str:
        sets = ", ".join(self.instruction_sets) or "no instruction sets known"
        return f"{self.name} ({sets})"


def parse_cpu_info(text: str) -> Processor:
    """Read the first processor of Linux's `/proc/cpuinfo`."""
    first = text.split("\n\n", maxsplit=1)[0]
    fields = dict(_field(line) for line in first.splitlines() if ":" in line)
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return Processor(
        name=fields.get("model name") or platform.machine(),
        instruction_sets=tuple(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags),
    )


def _field(line: str) -> tuple[str, str]:
    name, value = line.split(":", maxsplit=1)
    return name.strip(), value.strip()
