"""A kernel as the published model calls it: what ahead-of-time compilation needs to know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedShape:
    """One kernel with the types and constants of Kimi Linear 48B-A3B.

    Attributes:
        name: of the kernel in reports.
        kernel: the `triton.jit` function.
        signature: argument names, without the constants, to types such as `*bf16` or `i32`;
            `:16` after a type says that the address or number is a multiple of 16.
        constants: `tl.constexpr` argument names to values.
        warps: of 32 threads in a block.
        stages: loads that a loop keeps in flight.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int
