"""Our engine under measurement: what is timed, and the tokens it is timed with."""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shared.kernels.dtypes import WeightDType, WeightDTypeChoice
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState


class MeasuredEngine:
    """A loaded engine and random tokens for it, the same in every run."""

    def __init__(self, model: Path, dtype: WeightDTypeChoice, threads: int) -> None:
        self._engine = Engine.load(model, dtype, threads=threads)
        self._random = random.Random(0)

    @property
    def dtype(self) -> WeightDType:
        """Of its weights: its own choice if that was left to it."""
        return self._engine.dtype

    @contextmanager
    def requests(self, count: int, room: int) -> Iterator[list[RequestState]]:
        """Hold the states of new requests, each with room for that many tokens."""
        with ExitStack() as held:
            yield [held.enter_context(self._engine.new_state(room)) for _ in range(count)]

    def prefill(self, tokens: int, state: RequestState) -> float:
        """Run a prompt of that many tokens; gives the seconds it took."""
        prompt = self._tokens(tokens)
        start = time.perf_counter()
        self._engine.prefill([prompt], [state])
        return time.perf_counter() - start

    def decode(self, steps: int, states: list[RequestState]) -> float:
        """Run that many more tokens of every request; gives the seconds they took."""
        tokens = [self._tokens(len(states)) for _ in range(steps)]
        start = time.perf_counter()
        for step in tokens:
            self._engine.decode(step, states)
        return time.perf_counter() - start

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(self._engine.config.vocab_size), k=count)
