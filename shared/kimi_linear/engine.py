"""A loaded model: tokens and states in, logits out; the only part of it that workers need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor

from shared.errors import InvalidRequestError
from shared.kernels.dispatch import kernels_for
from shared.kimi_linear.checkpoint import load_weights
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.fingerprint import fingerprint
from shared.kimi_linear.fingerprint_cache import FingerprintCache
from shared.kimi_linear.model import KimiLinear
from shared.kimi_linear.read_progress import ReadProgress, unobserved
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.state_layout import DTypeName, StateLayout

SLICE_TOKENS: Final = 512
"""Tokens that go through all layers together: activations of more leave the processor's cache."""

DTYPES: Final[dict[DTypeName, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


class Engine:
    """A model ready to compute.

    Its methods block; a worker calls them from one thread of its own. They may be called from
    several at once as long as no state is in two calls.

    Attributes:
        config: of the model.
        fingerprint: identifies configuration and weights.
        layout: of the states it makes and takes.
    """

    def __init__(
        self, model: KimiLinear, config: KimiLinearConfig, layout: StateLayout, fingerprint: str
    ) -> None:
        self._model = model
        self.config = config
        self.layout = layout
        self.fingerprint = fingerprint

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: DTypeName,
        threads: int | None = None,
        *,
        cache: FingerprintCache | None = None,
        progress: ReadProgress = unobserved,
        hash_progress: ReadProgress = unobserved,
    ) -> Self:
        """Load a model directory.

        Args:
            directory: `config.json` and safetensors files in the published layout.
            dtype: of weights, activations, latents and convolution states.
            threads: processor threads of this process's tensor operations; None leaves them as
                they are.
            cache: of fingerprints; without it, all weights are hashed every time.
            progress: told of the weights as they are loaded.
            hash_progress: told of the weights as they are hashed after that, if they are.

        Raises:
            CheckpointError: the directory is incomplete, damaged or of another architecture.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        config = KimiLinearConfig.from_directory(directory)
        with torch.inference_mode():
            weights = load_weights(directory, config, DTYPES[dtype], progress)
        model = KimiLinear(weights, config, kernels_for("cpu"))
        # After loading: what is hashed is in the page cache now.
        identify = cache.fingerprint if cache else fingerprint
        return cls(model, config, config.state_layout(dtype), identify(directory, hash_progress))

    def new_state(self) -> RequestState:
        """The state of a request before its first token."""
        return RequestState.empty(self.layout)

    def prefill(self, tokens: Sequence[int], state: RequestState) -> Tensor:
        """Run the next tokens of a prompt, however many, and advance the state.

        Args:
            tokens: at least one.
            state: of the tokens before.

        Returns:
            Logits after the last token, `[vocabulary]`, fp32.

        Raises:
            InvalidRequestError: a token is not in the vocabulary, or the context is full.
        """
        slices = self._accept(tokens, state)
        with torch.inference_mode():
            for part in slices:
                hidden = self._model.prefill(part, state)
            return self._model.logits(hidden[-1:])[0]

    def prefill_all_logits(self, tokens: Sequence[int], state: RequestState) -> Tensor:
        """As `prefill`, with the logits after every token, `[T, vocabulary]`, fp32."""
        slices = self._accept(tokens, state)
        with torch.inference_mode():
            return torch.cat(
                [self._model.logits(self._model.prefill(part, state)) for part in slices]
            )

    def decode(self, tokens: Sequence[int], states: Sequence[RequestState]) -> Tensor:
        """Run the next token of each of B requests, which may be of different lengths.

        Args:
            tokens: one for each request.
            states: of these requests; advanced.

        Returns:
            Logits after each token, `[B, vocabulary]`, fp32.

        Raises:
            InvalidRequestError: a token is not in the vocabulary, or a context is full.
            ValueError: the numbers of tokens and states differ, or a state occurs twice.
        """
        if len(tokens) != len(states) or len({id(state) for state in states}) != len(states):
            raise ValueError(f"{len(tokens)} tokens for {len(states)} states, each to occur once")
        self._check_tokens(tokens)
        for state in states:
            self._check_room(state, 1)
        with torch.inference_mode():
            return self._model.logits(self._model.decode(torch.tensor(tokens), states))

    def _accept(self, tokens: Sequence[int], state: RequestState) -> tuple[Tensor, ...]:
        """Check a part of a prompt and cut it into slices of `SLICE_TOKENS` or, the last, fewer."""
        self._check_tokens(tokens)
        self._check_room(state, len(tokens))
        return torch.split(torch.tensor(tokens), SLICE_TOKENS)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise InvalidRequestError("there are no tokens to process")
        if not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            raise InvalidRequestError(
                f"token ids have to be in [0, {self.config.vocab_size}), "
                f"found {min(tokens)} to {max(tokens)}"
            )

    def _check_room(self, state: RequestState, tokens: int) -> None:
        limit = self.config.model_max_length
        if state.length + tokens > limit:
            raise InvalidRequestError(
                f"{tokens} tokens after {state.length} are more than the context of {limit}"
            )
