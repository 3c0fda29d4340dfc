"""A loaded model: tokens and states in, logits out; the only part of it that workers need."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor

from shared.errors import InvalidRequestError
from shared.kernels.batch import Batch
from shared.kernels.cpu.memory import keep_freed_memory
from shared.kernels.dispatch import AUTOMATIC, kernels_for
from shared.kernels.dtypes import WeightDType, WeightDTypeChoice
from shared.kimi_linear.checkpoint import load_weights
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.decode_steps import DecodeSteps
from shared.kimi_linear.fingerprint import fingerprint
from shared.kimi_linear.fingerprint_cache import FingerprintCache
from shared.kimi_linear.model import KimiLinear, LayerPassed, unobserved
from shared.kimi_linear.read_progress import ReadProgress
from shared.kimi_linear.read_progress import unobserved as unobserved_reading
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.state_pool import StatePool

SLICE_TOKENS: Final = 512
"""Tokens that go through all layers together: activations of more leave the processor's cache."""

DEFAULT_SLOT_TOKENS: Final = 8192

WARM_UP_TOKENS: Final = 160
"""More than any kernel computes in one piece."""

Slice = list[tuple[int, int, int]]
"""Requests whose tokens are computed together, each with the range of its tokens."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many requests an engine keeps the states of, and how long they may be.

    On a CPU memory is taken as it is used, so that room for many costs little until they come; on a
    GPU it is taken at once.

    Attributes:
        slots: requests.
        tokens: of all of them together; None makes it the model's context, or
            `DEFAULT_SLOT_TOKENS` for each slot, whichever is more.
    """

    slots: int = 64
    tokens: int | None = None


class Engine:
    """A model ready to compute, with room for the states of its requests.

    Its methods block; a worker calls those that compute from one thread of its own. States are made
    and released from any thread, also while another computes on them.

    Attributes:
        config: of the model.
        fingerprint: identifies configuration and weights.
        dtype: of the weights.
        layout: of the states it makes and takes.
    """

    def __init__(
        self,
        model: KimiLinear,
        config: KimiLinearConfig,
        fingerprint: str,
        dtype: WeightDType,
        pool: StatePool,
    ) -> None:
        self._model = model
        self._decode_steps = DecodeSteps(model, pool)
        self._pool = pool
        self.config = config
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.layout = pool.layout

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: WeightDTypeChoice,
        *,
        device: str = "cpu",
        threads: int | None = None,
        room: Room = Room(),
        cache: FingerprintCache | None = None,
        progress: ReadProgress = unobserved_reading,
        hash_progress: ReadProgress = unobserved_reading,
    ) -> Self:
        """Load a model directory.

        Sets the process's number of threads and how it treats freed memory (`keep_freed_memory`).

        Args:
            directory: `config.json` and safetensors files in the published layout.
            dtype: of the weights; `auto` is bf16, the width of the published ones.
            device: `cpu` or `cuda`, which computes and holds weights and states.
            threads: processor threads of this process's tensor operations; None leaves them as
                they are.
            room: for the states of requests.
            cache: of fingerprints; without it, all weights are hashed every time.
            progress: told of the weights as they are loaded.
            hash_progress: told of the weights as they are hashed after that, if they are.

        Raises:
            CheckpointError: the directory is incomplete, damaged or of another architecture.
            UnsupportedDeviceError: there is no such device, or no such weights on it.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        config = KimiLinearConfig.from_directory(directory)
        chosen = AUTOMATIC if dtype == "auto" else dtype
        kernels = kernels_for(device, chosen)
        with torch.inference_mode(), torch.device(device):
            weights = load_weights(directory, config, kernels, progress)
        keep_freed_memory()  # not earlier: what loading frees is not needed again
        pool = StatePool(
            config.state_layout(kernels.state_dtype),
            room.slots,
            room.tokens or max(config.model_max_length, DEFAULT_SLOT_TOKENS * room.slots),
            torch.device(device),
        )
        model = KimiLinear(weights, config, kernels)
        # After loading: what is hashed is in the page cache now.
        identify = cache.fingerprint if cache else fingerprint
        return cls(model, config, identify(directory, hash_progress), chosen, pool)

    def warm_up(self) -> None:
        """Run a few tokens of no request, so that all kernels are compiled before the first one.

        Raises:
            NoRoomError: other requests have all the room.
        """
        tokens = min(WARM_UP_TOKENS, self.capacity, self.config.model_max_length)
        with self.new_state(tokens) as state:
            for count in (tokens - 3, 2):  # many queries, then few after many keys
                self.prefill([[0] * count], [state])
            self.decode([0], [state])

    @property
    def capacity(self) -> int:
        """Tokens that all requests together have room for."""
        return self._pool.tokens

    def has_room(self, tokens: int) -> bool:
        """Whether `new_state` would succeed now."""
        return self._pool.has_room(tokens)

    def watch_room(self, freed: Callable[[], object]) -> None:
        """Have `freed` called, in whatever thread, each time that room has become free."""
        self._pool.watch(freed)

    def new_state(self, tokens: int) -> RequestState:
        """The state of a request before its first token; to be released in the end.

        Args:
            tokens: that the request may come to have, prompt and answer.

        Raises:
            NoRoomError: there is no room for it now.
        """
        return RequestState(self._pool, tokens)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        states: Sequence[RequestState],
        passed: LayerPassed = unobserved,
    ) -> Tensor:
        """Run the next tokens of R prompts, however many each, and advance their states.

        Tokens of several prompts are computed together, without padding.

        Args:
            prompts: at least one token each.
            states: of the tokens before, which may be of different lengths.
            passed: told of each layer when all tokens have passed it, in the thread that computes:
                its part of the states can be exported while the layers behind it are computed.

        Returns:
            Logits after the last token of each, `[R, vocabulary]`, fp32.

        Raises:
            InvalidRequestError: a token is not in the vocabulary, or a context is full.
            ValueError: the numbers of prompts and states differ, a state occurs twice, or one is
                still being imported.
        """
        self._check(prompts, states)
        ends: list[Tensor] = []
        with torch.inference_mode(), ExitStack() as uses:
            for state in states:  # to the end: what is released between two slices stays till then
                uses.enter_context(state.in_use())
            parts = list(_slices([len(prompt) for prompt in prompts], SLICE_TOKENS))
            for part in parts:
                hidden = self._forward(
                    [prompts[request][start:stop] for request, start, stop in part],
                    [states[request] for request, _, _ in part],
                    passed if part is parts[-1] else unobserved,
                )
                row = 0
                for request, start, stop in part:
                    row += stop - start
                    if stop == len(prompts[request]):
                        ends.append(hidden[row - 1])
            return self._model.logits(torch.stack(ends))

    def prefill_all_logits(self, prompt: Sequence[int], state: RequestState) -> Tensor:
        """As `prefill` of one prompt, with the logits after every token, `[T, vocabulary]`."""
        self._check([prompt], [state])
        with torch.inference_mode():
            return torch.cat(
                [
                    self._model.logits(self._forward([prompt[start:stop]], [state]))
                    for ((_, start, stop),) in _slices([len(prompt)], SLICE_TOKENS)
                ]
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
            ValueError: the numbers of tokens and states differ, a state occurs twice, or one is
                still being imported.
        """
        self._check([(token,) for token in tokens], states)
        with torch.inference_mode(), ExitStack() as uses:
            where = [uses.enter_context(state.in_use()) for state in states]
            logits = self._decode_steps(tokens, [state.length for state in states], where)
        for state in states:
            state.advance(1)
        return logits

    def _forward(
        self,
        parts: Sequence[Sequence[int]],
        states: Sequence[RequestState],
        passed: LayerPassed = unobserved,
    ) -> Tensor:
        """Run tokens of several requests at once: hidden states `[T, hidden]`, packed."""
        tokens = torch.tensor([token for part in parts for token in part], device=self._pool.device)
        with ExitStack() as uses:
            batch = Batch.pack(
                [len(part) for part in parts],
                [state.length for state in states],
                [uses.enter_context(state.in_use()) for state in states],
                self._pool.device,
            )
            hidden = self._model(tokens, self._pool, batch, passed)
        for part, state in zip(parts, states, strict=True):
            state.advance(len(part))
        return hidden

    def _check(self, parts: Sequence[Sequence[int]], states: Sequence[RequestState]) -> None:
        if len(parts) != len(states) or len({id(state) for state in states}) != len(states):
            raise ValueError(
                f"tokens of {len(parts)} requests for {len(states)} states, each to occur once"
            )
        if any(state.importing for state in states):
            raise ValueError("a state is still being imported: `finish_import` was not called")
        if not parts or not all(parts):
            raise InvalidRequestError("there are no tokens to process")
        lowest, highest = min(map(min, parts)), max(map(max, parts))
        if not 0 <= lowest <= highest < self.config.vocab_size:
            raise InvalidRequestError(
                f"token ids have to be in [0, {self.config.vocab_size}), "
                f"found {lowest} to {highest}"
            )
        for part, state in zip(parts, states, strict=True):
            limit = min(state.capacity, self.config.model_max_length)
            if state.length + len(part) > limit:
                raise InvalidRequestError(
                    f"{len(part)} tokens after {state.length} are more than the {limit} there "
                    "is room for"
                )


def _slices(lengths: Sequence[int], most: int) -> Iterator[Slice]:
    """Cut prompts into slices of `most` tokens, the last of fewer, that take up where one ended."""
    current: Slice = []
    room = most
    for request, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            current.append((request, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield current
                current, room = [], most
    if current:
        yield current
