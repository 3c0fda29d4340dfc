"""The state of one request while it is being prefilled or decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from shared.errors import SegmentShapeError
from shared.kernels.batch import Placement
from shared.kernels.dtypes import StateDType
from shared.kernels.torch_dtypes import TORCH_DTYPES
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_pool import StatePool


class RequestState:
    """Everything the model keeps of a request: KDA states, and the latents of all its tokens.

    The model writes to it in place. When a prefill or decode raises midway the state is neither the
    old nor the new one: it can be cleared or released. As a context manager it is released at the
    end.

    Room that is released while something computes on it is given back when that ends: what is
    cancelled never takes memory away from a computation, nor lets another request have it too.

    Attributes:
        layout: shapes and dtypes.
        length: tokens seen.
        capacity: tokens that it has room for.
    """

    def __init__(self, pool: StatePool, capacity: int) -> None:
        self.layout = pool.layout
        self.length = 0
        self.capacity = capacity
        self._pool = pool
        self._imported = 0
        self._uses = 0
        self._released = False
        self._placement: Placement | None = pool.place(capacity)
        self.clear()

    @contextmanager
    def in_use(self) -> Iterator[Placement]:
        """Keep the room while something reads or writes it; gives where it is.

        Raises:
            ValueError: the room was given back.
        """
        with self._pool.lock:
            placement = self._placement
            if placement is None:
                raise ValueError("the state was released")
            self._uses += 1
        try:
            yield placement
        finally:
            with self._pool.lock:
                self._uses -= 1
            self._free_if_done()

    def release(self) -> None:
        """Give the room back, now or when nothing uses it any more; once is enough."""
        self._released = True
        self._free_if_done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _free_if_done(self) -> None:
        with self._pool.lock:
            if not self._released or self._uses or self._placement is None:
                return
            placement, self._placement = self._placement, None
        self._pool.free(placement)

    def advance(self, tokens: int) -> None:
        """Count tokens as seen, after all layers have seen them."""
        self.length += tokens

    def clear(self) -> None:
        """Go back to before the first token."""
        with self.in_use() as placement:
            self.length = self._imported = 0
            self._pool.clear(placement.slot)

    # --- export ----------------------------------------------------------------------------

    def snapshot(self) -> KdaSnapshot:
        """Copy the part of the state that is valid at this length only, to the CPU."""
        with self.in_use() as placement:
            convolution = self._pool.convolution[:, placement.slot].mT.contiguous()
            return KdaSnapshot(
                self.length,
                recurrent=self._pool.recurrent[:, placement.slot].to("cpu", copy=True),
                convolution=convolution.to("cpu"),
            )

    def export_latents(self, start: int, stop: int) -> Tensor:
        """Copy the latents of tokens [start, stop): `[mla_layers, stop - start, latent_dim]`.

        Raises:
            ValueError: the state has no such tokens.
        """
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"no tokens [{start}, {stop}) in a state of {self.length}")
        latents = self._pool.latents
        exported = torch.empty(self.layout.latents_shape(stop - start), dtype=latents.dtype)
        with self.in_use() as placement:
            for rows, part in placement.split(start, stop):
                exported[:, part] = latents[:, rows]
        return exported

    # --- import ----------------------------------------------------------------------------

    def import_latents(self, latents: Tensor) -> None:
        """Take in the latents of the next tokens of a state that was exported elsewhere.

        Args:
            latents: `[mla_layers, n, latent_dim]`, of the tokens behind those imported so far.

        Raises:
            SegmentShapeError: a shape or dtype is not what the layout says, or there is no room.
            ValueError: the state has tokens of its own, which these would replace.
        """
        if self.length:
            raise ValueError(f"latents for a state that has seen {self.length} tokens, not cleared")
        tokens = latents.shape[1] if latents.ndim == 3 else 0
        expected = self.layout.latents_shape(tokens)
        _check("latents", latents, expected, self.layout.latent_dtype)
        start, stop = self._imported, self._imported + tokens
        if stop > self.capacity:
            raise SegmentShapeError(f"latents of {stop} tokens, there is room for {self.capacity}")
        with self.in_use() as placement:
            for rows, part in placement.split(start, stop):
                self._pool.latents[:, rows] = latents[:, part]
        self._imported = stop

    def import_snapshot(self, snapshot: KdaSnapshot) -> None:
        """Take in the KDA states that belong to the imported latents; the state is whole then.

        Raises:
            SegmentShapeError: a shape or dtype is not what the layout says, or the snapshot is of
                another length than the latents.
        """
        layout = self.layout
        _check("recurrent", snapshot.recurrent, layout.recurrent_shape, layout.recurrent_dtype)
        _check(
            "convolution",
            snapshot.convolution,
            layout.convolution_shape,
            layout.convolution_dtype,
        )
        if snapshot.length != self._imported or snapshot.length < 1:
            raise SegmentShapeError(
                f"KDA states at {snapshot.length} tokens with latents of {self._imported}"
            )
        with self.in_use() as placement:
            self._pool.recurrent[:, placement.slot] = snapshot.recurrent
            self._pool.convolution[:, placement.slot] = snapshot.convolution.mT
        self.length = snapshot.length


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: StateDType) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != TORCH_DTYPES[dtype]:
        raise SegmentShapeError(
            f"{name} state is {tensor.dtype} {tuple(tensor.shape)}, "
            f"expected {TORCH_DTYPES[dtype]} {shape}"
        )
