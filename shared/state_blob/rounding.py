"""What lossy codecs keep of a state's tensors.

Each rounding turns the tensors of a state into those that are stored, and back. Its reader knows
from the state's shapes which stored tensors there have to be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

from shared.errors import SegmentPayloadError
from shared.state_blob.codecs import RoundingName
from shared.state_blob.header import ElementDType

_LARGEST_INT8: Final = 127


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a segment has to have."""

    name: str
    dtypes: tuple[ElementDType, ...]
    """Any of these."""
    shape: tuple[int, ...]


class Rounding(Protocol):
    """A pair of functions between the tensors of a state and what is stored of them."""

    def store(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Round tensors, fp32 or bf16 and on the CPU.

        Raises:
            ValueError: their values cannot be stored.
        """

    def stored(self, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """What is stored of tensors of these shapes."""

    def restore(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Go back from what `stored` describes, to fp32 or bf16.

        Raises:
            SegmentPayloadError: values are stored that `store` does not make.
        """


class Exact:
    """Nothing is rounded."""

    def store(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Rounding.store`."""
        return tensors

    def stored(self, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """See `Rounding.stored`."""
        return list(specs)

    def restore(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Rounding.restore`."""
        return stored


class Bf16State:
    """Recurrent states to bf16: to the nearest, to the even one of two, and NaN stays NaN."""

    def store(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Rounding.store`."""
        return tensors | {"recurrent": tensors["recurrent"].to(torch.bfloat16)}

    def stored(self, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """See `Rounding.stored`."""
        return [
            replace(spec, dtypes=("bfloat16",)) if spec.name == "recurrent" else spec
            for spec in specs
        ]

    def restore(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Rounding.restore`."""
        return stored


class Int8Latent:
    """Latents to integers of -127 to 127, and one scale for a layer's channel over all tokens."""

    def store(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Rounding.store`; latents that are not finite have no scale and are refused."""
        latents = tensors["latents"].to(torch.float32)  # [layers, n, channels]
        layers, tokens, channels = latents.shape
        if not tokens:
            return {
                "latents": latents.to(torch.int8),
                "scales": torch.zeros(layers, channels),
            }
        lowest, highest = torch.aminmax(latents, dim=1)
        largest = torch.maximum(-lowest, highest)
        if not largest.isfinite().all():
            raise ValueError("latents are not finite, which int8 cannot hold")
        # Towards zero: what is restored is then finite, however large the latents are.
        scales = (largest / _LARGEST_INT8).nextafter(torch.zeros(()))
        divisors = scales.where(scales > 0, 1.0)  # of channels that are zero, or as good as
        numbers = (latents / divisors[:, None]).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
        return {"latents": numbers.to(torch.int8), "scales": scales}

    def stored(self, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """See `Rounding.stored`."""
        (latents,) = specs
        layers, _, channels = latents.shape
        return [
            replace(latents, dtypes=("int8",)),
            TensorSpec("scales", ("float32",), (layers, channels)),
        ]

    def restore(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Rounding.restore`."""
        scales = stored["scales"]
        if not ((scales >= 0) & scales.isfinite()).all():
            raise SegmentPayloadError("a scale of latents is negative or not finite")
        return {"latents": stored["latents"].to(torch.float32).mul_(scales[:, None])}


ROUNDINGS: Final[dict[RoundingName, Rounding]] = {
    "exact": Exact(),
    "bf16-state": Bf16State(),
    "int8-latent": Int8Latent(),
}
