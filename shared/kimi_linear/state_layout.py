"""The shape of a request's state, without torch: services that hold no tensors read it too."""

from dataclasses import dataclass
from math import prod
from typing import Final

from shared.kernels.dtypes import StateDType

DTYPE_BYTES: Final[dict[StateDType, int]] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Shapes and dtypes of one request's state (Kimi Linear report, sections 3 and 4).

    A KDA layer keeps a recurrent state and the last inputs of its three short convolutions, both
    independent of the length; an MLA layer keeps one latent (compressed c_kv, then k_pe) a token.
    """

    kda_layers: int
    kda_heads: int
    kda_head_dim: int
    convolution_taps: int
    """Inputs kept for each convolution channel: its kernel size minus one."""
    mla_layers: int
    latent_dim: int
    """kv_lora_rank + qk_rope_head_dim."""
    latent_dtype: StateDType
    convolution_dtype: StateDType
    recurrent_dtype: StateDType = "float32"

    @property
    def convolution_channels(self) -> int:
        """Channels of the query, key and value convolutions together."""
        return 3 * self.kda_heads * self.kda_head_dim

    @property
    def recurrent_shape(self) -> tuple[int, int, int, int]:
        """`[kda_layers, heads, K, V]`."""
        return (self.kda_layers, self.kda_heads, self.kda_head_dim, self.kda_head_dim)

    @property
    def convolution_shape(self) -> tuple[int, int, int]:
        """`[kda_layers, 3 * heads * K, taps]`: query, key and value channels, oldest tap first."""
        return (self.kda_layers, self.convolution_channels, self.convolution_taps)

    @property
    def signature(self) -> str:
        """Text that two layouts share exactly if one can read the other's states.

        It names no dtypes: a reader converts them.
        """
        recurrent = "x".join(map(str, self.recurrent_shape))
        convolution = "x".join(map(str, self.convolution_shape))
        return (
            f"kda {recurrent}, convolution {convolution}, mla {self.mla_layers}x{self.latent_dim}"
        )

    @property
    def kda_layer_bytes(self) -> int:
        """Uncompressed bytes of the state of one KDA layer."""
        return (
            prod(self.recurrent_shape[1:]) * DTYPE_BYTES[self.recurrent_dtype]
            + prod(self.convolution_shape[1:]) * DTYPE_BYTES[self.convolution_dtype]
        )

    def latents_shape(self, tokens: int) -> tuple[int, int, int]:
        """`[mla_layers, tokens, latent_dim]`."""
        return (self.mla_layers, tokens, self.latent_dim)

    def state_bytes(self, tokens: int) -> int:
        """Uncompressed bytes of the whole state of a request of `tokens` tokens."""
        return (
            self.kda_layers * self.kda_layer_bytes
            + prod(self.latents_shape(tokens)) * DTYPE_BYTES[self.latent_dtype]
        )
