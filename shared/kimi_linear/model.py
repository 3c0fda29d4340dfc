"""Kimi Linear: embedding, a stack of layers, head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from shared.kernels.dispatch import Kernels
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.feed_forward import DenseFeedForward, MixtureOfExperts
from shared.kimi_linear.kda import KdaAttention
from shared.kimi_linear.mla import MlaAttention
from shared.kimi_linear.normalization import rms_norm
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.weights import DenseWeights, KdaWeights, LayerWeights, ModelWeights


class Attention(Protocol):
    """The part of a layer that looks at other tokens and owns a part of the state."""

    def prefill(self, x: Tensor, state: RequestState) -> Tensor:
        """Attend T successive tokens of one request, `[T, hidden]`."""
        ...

    def decode(self, x: Tensor, states: Sequence[RequestState]) -> Tensor:
        """Attend one token of each of B requests, `[B, hidden]`."""
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
    epsilon: float

    def prefill(self, x: Tensor, state: RequestState) -> Tensor:
        """T successive tokens of one request, `[T, hidden]`."""
        normalised = rms_norm(x, self.attention_norm, self.epsilon)
        return self._with_feed_forward(x + self.attention.prefill(normalised, state))

    def decode(self, x: Tensor, states: Sequence[RequestState]) -> Tensor:
        """One token of each of B requests, `[B, hidden]`."""
        normalised = rms_norm(x, self.attention_norm, self.epsilon)
        return self._with_feed_forward(x + self.attention.decode(normalised, states))

    def _with_feed_forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(rms_norm(x, self.feed_forward_norm, self.epsilon))


class KimiLinear:
    """The whole network, without any notion of a text or of sampling."""

    def __init__(self, weights: ModelWeights, config: KimiLinearConfig, kernels: Kernels) -> None:
        self._weights = weights
        self._epsilon = config.rms_norm_eps
        self._layers = _build_layers(weights.layers, config, kernels)

    def prefill(self, tokens: Tensor, state: RequestState) -> Tensor:
        """Run T successive tokens of one request through all layers and advance its state.

        Args:
            tokens: `[T]`, int64.
            state: of the tokens before.

        Returns:
            Hidden states `[T, hidden]`, for `logits`.
        """
        x = functional.embedding(tokens, self._weights.embedding)
        for layer in self._layers:
            x = layer.prefill(x, state)
        state.advance(tokens.shape[0])
        return x

    def decode(self, tokens: Tensor, states: Sequence[RequestState]) -> Tensor:
        """Run one token of each of B requests through all layers and advance their states.

        Args:
            tokens: `[B]`, int64.
            states: B different states, of any lengths.

        Returns:
            Hidden states `[B, hidden]`, for `logits`.
        """
        x = functional.embedding(tokens, self._weights.embedding)
        for layer in self._layers:
            x = layer.decode(x, states)
        for state in states:
            state.advance(1)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[T, hidden]` to logits `[T, vocabulary]`, fp32."""
        normalised = rms_norm(hidden, self._weights.norm, self._epsilon)
        return functional.linear(normalised, self._weights.head).float()


def _build_layers(
    layers: tuple[LayerWeights, ...], config: KimiLinearConfig, kernels: Kernels
) -> tuple[Layer, ...]:
    kinds = config.layer_kinds
    return tuple(
        Layer(
            attention_norm=layer.attention_norm,
            attention=_build_attention(layer, config, kernels, kinds[:n].count(kinds[n])),
            feed_forward_norm=layer.feed_forward_norm,
            feed_forward=_build_feed_forward(layer, config),
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


def _build_feed_forward(layer: LayerWeights, config: KimiLinearConfig) -> FeedForward:
    if isinstance(layer.feed_forward, DenseWeights):
        return DenseFeedForward(layer.feed_forward)
    return MixtureOfExperts(layer.feed_forward, config)
