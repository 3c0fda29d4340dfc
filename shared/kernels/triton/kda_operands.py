"""What the Triton kernels of Kimi Delta Attention ask of the tensors they are given."""

from torch import Tensor


def check_kda_operands(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor
) -> None:
    """Make sure that the kernels address these tensors as they lie in memory.

    Args:
        q: `[T, H, K]`, heads and channels next to each other, as of k and v.
        k: `[T, H, K]`.
        v: `[T, H, V]`.
        g: `[T, H, K]`, contiguous, as beta and states.
        beta: `[T, H]`.
        states: `[slots, H, K, V]`.

    Raises:
        ValueError: one of them lies otherwise, or K or V is not a power of two of at least 16.
    """
    for name, rows in (("q", q), ("k", k), ("v", v)):
        channels = rows.shape[-1]
        if channels < 16 or channels & (channels - 1):
            raise ValueError(f"{name} has {channels} channels: not a power of two of at least 16")
        if rows.stride()[1:] != (channels, 1):
            raise ValueError(f"the heads and channels of {name} do not lie next to each other")
    for name, tensor in (("g", g), ("beta", beta), ("states", states)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
