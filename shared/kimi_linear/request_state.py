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
    old nor the new one: it can be cleared or released. A state that was exported elsewhere is
    imported piece by piece, and is nothing to compute on before `finish_import`. As a context
    manager it is released at the end.

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
        self._covered = 0
        self._imported_layers: dict[int, int] = {}
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
            self.length = 0
            self._forget_imports()
            self._pool.clear(placement.slot)

    # --- export ----------------------------------------------------------------------------

    def snapshot(self) -> KdaSnapshot:
        """Copy the part of the state that is valid at this length only, to the CPU."""
        return self.snapshot_of(range(self.layout.kda_layers), self.length)

    def snapshot_of(self, layers: range, length: int) -> KdaSnapshot:
        """Copy the states of some KDA layers to the CPU.

        Args:
            layers: neighbouring ones, counted among the KDA layers.
            length: tokens that they have seen; more than the state while these tokens are on their
                way through the layers behind (`Engine.prefill`).
        """
        part = slice(layers.start, layers.stop)
        with self.in_use() as placement:
            convolution = self._pool.convolution[part, placement.slot].mT.contiguous()
            return KdaSnapshot(
                length,
                recurrent=self._pool.recurrent[part, placement.slot].to("cpu", copy=True),
                convolution=convolution.to("cpu"),
                first_layer=layers.start,
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

    @property
    def importing(self) -> bool:
        """Whether it has imported parts and was not finished: there is nothing to compute on."""
        return bool(self._covered or self._imported_layers)

    def import_latents(self, start: int, latents: Tensor) -> None:
        """Take in the latents of tokens of a state that was exported elsewhere.

        Args:
            start: the first of these tokens; at most behind the last of those imported so far.
                Those that were imported before are replaced.
            latents: `[mla_layers, n, latent_dim]`.

        Raises:
            SegmentShapeError: a shape or dtype is not what the layout says, tokens are left out, or
                there is no room.
            ValueError: the state has tokens of its own, which these would replace.
        """
        self._check_empty("latents")
        tokens = latents.shape[1] if latents.ndim == 3 else 0
        expected = self.layout.latents_shape(tokens)
        _check("latents", latents, expected, self.layout.latent_dtype)
        stop = start + tokens
        if not 0 <= start <= self._covered:
            raise SegmentShapeError(f"latents from {start} on, with latents of {self._covered}")
        if stop > self.capacity:
            raise SegmentShapeError(f"latents of {stop} tokens, there is room for {self.capacity}")
        with self.in_use() as placement:
            for rows, part in placement.split(start, stop):
                self._pool.latents[:, rows] = latents[:, part]
        with self._pool.lock:
            self._covered = max(self._covered, stop)

    def import_snapshot(self, piece: KdaSnapshot) -> None:
        """Take in the states of some or all KDA layers; those imported before are replaced.

        Raises:
            SegmentShapeError: a shape or dtype is not what the layout says, or there are no such
                layers.
            ValueError: the state has tokens of its own, to which these do not belong.
        """
        self._check_empty("KDA states")
        layout, layers = self.layout, range(piece.first_layer, piece.first_layer + piece.layers)
        if not 0 <= layers.start <= layers.stop <= layout.kda_layers:
            raise SegmentShapeError(
                f"KDA states of layers {layers.start} to {layers.stop} of {layout.kda_layers}"
            )
        recurrent_shape = (len(layers), *layout.recurrent_shape[1:])
        convolution_shape = (len(layers), *layout.convolution_shape[1:])
        _check("recurrent", piece.recurrent, recurrent_shape, layout.recurrent_dtype)
        _check("convolution", piece.convolution, convolution_shape, layout.convolution_dtype)
        rows = slice(layers.start, layers.stop)
        with self.in_use() as placement:
            self._pool.recurrent[rows, placement.slot] = piece.recurrent
            self._pool.convolution[rows, placement.slot] = piece.convolution.mT
        with self._pool.lock:
            self._imported_layers |= dict.fromkeys(layers, piece.length)

    def finish_import(self, length: int) -> None:
        """Declare the imported state whole: it has seen `length` tokens then.

        Raises:
            SegmentShapeError: latents of these tokens, or the states of KDA layers after exactly
                these, were not imported.
        """
        if not 1 <= length <= self._covered:
            raise SegmentShapeError(f"a state of {length} tokens with latents of {self._covered}")
        for layer in range(self.layout.kda_layers):
            found = self._imported_layers.get(layer)
            if found != length:
                where = "missing" if found is None else f"at {found} tokens"
                raise SegmentShapeError(
                    f"a state of {length} tokens with the KDA state of layer {layer} {where}"
                )
        self._forget_imports()
        self.length = length

    def _forget_imports(self) -> None:
        with self._pool.lock:
            self._covered = 0
            self._imported_layers = {}

    def _check_empty(self, what: str) -> None:
        if self.length:
            raise ValueError(f"{what} for a state that has seen {self.length} tokens, not cleared")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: StateDType) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != TORCH_DTYPES[dtype]:
        raise SegmentShapeError(
            f"{name} state is {tensor.dtype} {tuple(tensor.shape)}, "
            f"expected {TORCH_DTYPES[dtype]} {shape}"
        )
