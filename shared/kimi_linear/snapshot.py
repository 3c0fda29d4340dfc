"""The part of a request's state that is valid at exactly one length."""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KdaSnapshot:
    """State of successive KDA layers, of all or only some, after `length` tokens."""

    length: int
    recurrent: Tensor
    """`[layers, heads, K, V]`, fp32."""
    convolution: Tensor
    """`[layers, 3 * heads * K, taps]`: last inputs of the convolutions, oldest first."""
    first_layer: int = 0
    """The first of these layers, counted among the KDA layers."""

    @property
    def layers(self) -> int:
        """Number of KDA layers."""
        return len(self.recurrent)

    def split(self, most_bytes: int) -> "tuple[KdaSnapshot, ...]":
        """Divide it by layers into pieces of at most so many bytes, as equal as they can be.

        The pieces are views. One layer is never divided, even if it alone has more bytes.

        Raises:
            ValueError: there is no room for any byte in a piece.
        """
        if most_bytes < 1:
            raise ValueError(f"pieces of {most_bytes} bytes hold nothing")
        if not self.layers:
            return ()
        layer_bytes = self.recurrent[0].nbytes + self.convolution[0].nbytes
        most_layers = max(1, most_bytes // max(1, layer_bytes))
        pieces = ceil(self.layers / most_layers)
        edges = [self.layers * number // pieces for number in range(pieces + 1)]
        return tuple(
            KdaSnapshot(
                self.length,
                self.recurrent[start:stop],
                self.convolution[start:stop],
                self.first_layer + start,
            )
            for start, stop in pairwise(edges)
        )
