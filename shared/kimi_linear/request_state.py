"""The state of one request while it is being prefilled or decoded."""

from typing import Final, Self

import torch
from torch import Tensor

from shared.errors import SegmentShapeError
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout

SMALLEST_GROWTH: Final = 256
"""Tokens by which the latent buffer grows at least; otherwise by a quarter of its size."""


class RequestState:
    """Everything the model keeps of a request: KDA states, and the latents of all its tokens.

    The model writes to it in place. When a prefill or decode raises midway the state is neither the
    old nor the new one and has to be dropped.

    Attributes:
        layout: shapes and dtypes.
        length: tokens seen.
        recurrent: `[kda_layers, heads, K, V]`, fp32.
        convolution: `[kda_layers, taps, 3 * heads * K]`, oldest input first: the snapshot's
            transposed, so that an input is one row, as it is among the activations.
    """

    def __init__(
        self,
        layout: StateLayout,
        length: int,
        recurrent: Tensor,
        convolution: Tensor,
        latents: Tensor,
    ) -> None:
        self.layout = layout
        self.length = length
        self.recurrent = recurrent
        self.convolution = convolution
        self._latents = latents

    @classmethod
    def empty(cls, layout: StateLayout) -> Self:
        """The state before the first token."""
        return cls(
            layout,
            length=0,
            recurrent=torch.zeros(layout.recurrent_shape, dtype=_dtype(layout.recurrent_dtype)),
            convolution=torch.zeros(
                layout.convolution_shape, dtype=_dtype(layout.convolution_dtype)
            ).mT.contiguous(),
            latents=torch.empty(layout.latents_shape(0), dtype=_dtype(layout.latent_dtype)),
        )

    @classmethod
    def restore(cls, layout: StateLayout, snapshot: KdaSnapshot, latents: Tensor) -> Self:
        """Continue a state that was exported elsewhere.

        Takes the recurrent states and the latents over without a copy: nobody else may write to
        them from now on.

        Args:
            layout: what the model needs.
            snapshot: KDA states at some length.
            latents: of exactly that many tokens, `[mla_layers, length, latent_dim]`.

        Raises:
            SegmentShapeError: a shape or dtype is not what the layout says.
        """
        if snapshot.length < 1:
            raise SegmentShapeError(f"a state of {snapshot.length} tokens cannot be continued")
        expected = (
            ("recurrent", snapshot.recurrent, layout.recurrent_shape, layout.recurrent_dtype),
            (
                "convolution",
                snapshot.convolution,
                layout.convolution_shape,
                layout.convolution_dtype,
            ),
            ("latents", latents, layout.latents_shape(snapshot.length), layout.latent_dtype),
        )
        for name, tensor, shape, dtype in expected:
            if tuple(tensor.shape) != shape or tensor.dtype != _dtype(dtype):
                raise SegmentShapeError(
                    f"{name} state is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"expected {_dtype(dtype)} {shape}"
                )
        return cls(
            layout,
            length=snapshot.length,
            recurrent=snapshot.recurrent.contiguous(),
            convolution=snapshot.convolution.mT.contiguous(),
            latents=latents.contiguous(),
        )

    def snapshot(self) -> KdaSnapshot:
        """Copy the part of the state that is valid at this length only."""
        return KdaSnapshot(
            self.length,
            recurrent=self.recurrent.clone(),
            convolution=self.convolution.mT.clone(memory_format=torch.contiguous_format),
        )

    def export_latents(self, start: int, stop: int) -> Tensor:
        """Copy the latents of tokens [start, stop): `[mla_layers, stop - start, latent_dim]`.

        Raises:
            ValueError: the state has no such tokens.
        """
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"no tokens [{start}, {stop}) in a state of {self.length}")
        return self._latents[:, start:stop].clone(memory_format=torch.contiguous_format)

    def append_latents(self, mla_layer: int, new: Tensor) -> Tensor:
        """Put one layer's latents of the tokens being processed behind those of the tokens seen.

        Every MLA layer appends the same number of tokens before `advance` counts them.

        Args:
            mla_layer: counted among the MLA layers, from 0.
            new: `[n, latent_dim]`.

        Returns:
            The layer's latents with the new ones, `[length + n, latent_dim]`; a view.
        """
        stop = self.length + new.shape[0]
        self._reserve(stop)
        self._latents[mla_layer, self.length : stop] = new
        return self._latents[mla_layer, :stop]

    def advance(self, tokens: int) -> None:
        """Count tokens as seen, after all layers have seen them."""
        self.length += tokens

    def _reserve(self, tokens: int) -> None:
        capacity = self._latents.shape[1]
        if tokens <= capacity:
            return
        grown = max(tokens, capacity + max(capacity // 4, SMALLEST_GROWTH))
        latents = self._latents.new_empty(self.layout.latents_shape(grown))
        latents[:, : self.length] = self._latents[:, : self.length]
        self._latents = latents


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
