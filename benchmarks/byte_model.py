"""An interpolated 5-gram model of bytes: what counting alone makes of a text."""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

ORDER: Final = 5
DISCOUNT: Final = 0.75
"""Taken from every count and given to the shorter contexts."""
BYTES: Final = 256

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Level:
    """Counts of the n-grams of one length, and of their contexts."""

    grams: Keys
    counts: Floats
    contexts: Keys
    totals: Floats
    """Of the counts after each context."""
    kinds: Floats
    """Different bytes after each context."""

    @classmethod
    def of(cls, grams: Keys, counts: Floats) -> Self:
        contexts, first, kinds = np.unique(
            grams >> np.uint64(8), return_index=True, return_counts=True
        )
        return cls(
            grams, counts, contexts, np.add.reduceat(counts, first), kinds.astype(np.float64)
        )

    def interpolate(self, grams: Keys, lower: Floats) -> Floats:
        """Probabilities of the last byte of each n-gram, given those by shorter contexts."""
        counts = _looked_up(self.grams, self.counts, grams)
        contexts = grams >> np.uint64(8)
        totals = _looked_up(self.contexts, self.totals, contexts)
        kinds = _looked_up(self.contexts, self.kinds, contexts)
        seen = np.maximum(totals, 1)
        found = (np.maximum(counts - DISCOUNT, 0) + DISCOUNT * kinds * lower) / seen
        return np.where(totals > 0, found, lower)


class ByteModel:
    """Interpolated Kneser-Ney smoothing (Chen and Goodman 1998) with one discount."""

    def __init__(self, text: bytes) -> None:
        """Count a text."""
        grams, counts = np.unique(_grams(text, ORDER), return_counts=True)
        levels = [_Level.of(grams, counts.astype(np.float64))]
        for order in range(ORDER - 1, 0, -1):
            # A shorter n-gram counts once for each byte that was seen before it.
            endings = levels[-1].grams & np.uint64(BYTES**order - 1)
            shorter, kinds = np.unique(endings, return_counts=True)
            levels.append(_Level.of(shorter, kinds.astype(np.float64)))
        self._levels = levels[::-1]

    def bits_per_byte(self, text: bytes) -> float:
        """Bits to tell each byte of a text from those before it, on average."""
        grams = _grams(text, ORDER)
        probabilities = np.full(len(grams), 1 / BYTES)
        for order, level in enumerate(self._levels, 1):
            probabilities = level.interpolate(grams & np.uint64(BYTES**order - 1), probabilities)
        return float(-np.log2(probabilities).mean())


def _grams(text: bytes, order: int) -> Keys:
    """The n-gram that ends with each byte, as a number; zeros stand before the text."""
    data = np.frombuffer(bytes(order - 1) + text, dtype=np.uint8).astype(np.uint64)
    keys = np.zeros(len(text), dtype=np.uint64)
    for n in range(order):
        keys = (keys << np.uint64(8)) | data[n : n + len(text)]
    return keys


def _looked_up(keys: Keys, values: Floats, wanted: Keys) -> Floats:
    """The value of each wanted key, 0 where there is none."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0.0)
