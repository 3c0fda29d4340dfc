"""Kimi Linear: embedding, a stack of layers, head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from shared.kernels.batch import Batch
from shared.kernels.interface import Kernels, Step
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
    """Two parts, each of which adds to the tokens what it makes of them in normalised form."""

    attention_norm: Tensor
    attention: Attention
    feed_forward_norm: Tensor
    feed_forward: FeedForward


class KimiLinear:
    """The whole network, without any notion of a text or of sampling."""

    def __init__(self, weights: ModelWeights, config: KimiLinearConfig, kernels: Kernels) -> None:
        self._weights = weights
        self._kernels = kernels
        self._epsilon = config.rms_norm_eps
        self._layers = _build_layers(weights.layers, config, kernels)
        self._next_norms = [*(layer.attention_norm for layer in self._layers[1:]), weights.norm]

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
            Hidden states `[T, hidden]`, normalised, for `logits`.
        """
        add_rms_norm, epsilon = self._kernels.add_rms_norm, self._epsilon
        x = self._weights.embedding(tokens)
        normalised = self._kernels.rms_norm(x, self._layers[0].attention_norm, epsilon)
        for number, (layer, next_norm) in enumerate(
            zip(self._layers, self._next_norms, strict=True)
        ):
            attended = layer.attention(normalised, pool, batch)
            x, normalised = add_rms_norm(x, attended, layer.feed_forward_norm, epsilon)
            x, normalised = add_rms_norm(x, layer.feed_forward(normalised), next_norm, epsilon)
            passed(number)
        return normalised

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[T, hidden]` to logits `[T, vocabulary]`, fp32."""
        return self._weights.head(hidden).float()

    def captured(self, step: Step) -> Step:
        """Make a step of the two above cheaper to run again: see `Kernels.captured`."""
        return self._kernels.captured(step)


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
