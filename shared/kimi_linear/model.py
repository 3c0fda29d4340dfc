"""Kimi Linear: embedding, a stack of layers, head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor
from torch.nn import functional

from shared.kernels.batch import Batch
from shared.kernels.interface import Kernels
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.feed_forward import MixtureOfExperts
from shared.kimi_linear.kda import KdaAttention
from shared.kimi_linear.mla import MlaAttention
from shared.kimi_linear.state_pool import StatePool
from shared.kimi_linear.weights import KdaWeights, LayerWeights, MixtureWeights, ModelWeights

LayerPassed: TypeAlias = Callable[[int], object]
"""Is told of a layer, counted from 0, whose part of the states is final until more tokens come."""


def unobserved(layer: int) -> None:
    """Ask for no word of layers."""
    del layer


class Attention(Protocol):
    """The part of a layer that looks at other tokens and owns a part of the state."""

    def __call__(self, x: Tensor, pool: StatePool, batch: Batch) -> Tensor:
        """Attend the batch's tokens, `[T, hidden]`, and advance their requests' states."""
        ...


class FeedForward(Protocol):
    """The part of a layer that looks at each token by itself."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """x + attention(norm x), then x + feed_forward(norm x)."""

    attention_norm: Tensor
    attention: Attention
    feed_forward_norm: Tensor
    feed_forward: FeedForward
    kernels: Kernels
    epsilon: float

    def __call__(self, x: Tensor, pool: StatePool, batch: Batch) -> Tensor:
        """The batch's tokens, `[T, hidden]`."""
        normalised = self.kernels.rms_norm(x, self.attention_norm, self.epsilon)
        x = x + self.attention(normalised, pool, batch)
        normalised = self.kernels.rms_norm(x, self.feed_forward_norm, self.epsilon)
        return x + self.feed_forward(normalised)


class KimiLinear:
    """The whole network, without any notion of a text or of sampling."""

    def __init__(self, weights: ModelWeights, config: KimiLinearConfig, kernels: Kernels) -> None:
        self._weights = weights
        self._kernels = kernels
        self._epsilon = config.rms_norm_eps
        self._layers = _build_layers(weights.layers, config, kernels)

    def __call__(
        self,
        tokens: Tensor,
        pool: StatePool,
        batch: Batch,
        passed: LayerPassed = unobserved,
    ) -> Tensor:
        """Run the next tokens of each request through all layers; their states advance in place.

        Args:
            tokens: `[T]`, int64.
            pool: holds the states.
            batch: of T tokens; a request occurs in it once.
            passed: told of each layer that the tokens have passed.

        Returns:
            Hidden states `[T, hidden]`, for `logits`.
        """
        x = functional.embedding(tokens, self._weights.embedding).to(self._kernels.activation_dtype)
        for number, layer in enumerate(self._layers):
            x = layer(x, pool, batch)
            passed(number)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[T, hidden]` to logits `[T, vocabulary]`, fp32."""
        normalised = self._kernels.rms_norm(hidden, self._weights.norm, self._epsilon)
        return self._weights.head(normalised).float()


def _build_layers(
    layers: tuple[LayerWeights, ...], config: KimiLinearConfig, kernels: Kernels
) -> tuple[Layer, ...]:
    kinds = config.layer_kinds
    return tuple(
        Layer(
            attention_norm=layer.attention_norm,
            attention=_build_attention(layer, config, kernels, kinds[:n].count(kinds[n])),
            feed_forward_norm=layer.feed_forward_norm,
            feed_forward=_build_feed_forward(layer, config, kernels),
            kernels=kernels,
            epsilon=config.rms_norm_eps,
        )
        for n, layer in enumerate(layers)
    )


def _build_attention(
    layer: LayerWeights, config: KimiLinearConfig, kernels: Kernels, index: int
) -> Attention:
    if isinstance(layer.attention, KdaWeights):
        return KdaAttention(layer.attention, config, kernels, index)
    return MlaAttention(layer.attention, config, kernels, index)


def _build_feed_forward(
    layer: LayerWeights, config: KimiLinearConfig, kernels: Kernels
) -> FeedForward:
    if isinstance(layer.feed_forward, MixtureWeights):
        return MixtureOfExperts(layer.feed_forward, config, kernels)
    return layer.feed_forward
