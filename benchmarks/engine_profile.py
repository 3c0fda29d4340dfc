"""Where the engine's time goes, by kernel."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from unittest.mock import patch

import numpy as np
from torch import Tensor

from benchmarks.measured_engine import MeasuredEngine
from benchmarks.measurement import Workload
from shared.kernels.cpu.native_calls import Call, CallSequence, MachineCode
from shared.kernels.dispatch import kernels_for
from shared.kernels.dtypes import WeightDType, WeightDTypeChoice
from shared.kernels.interface import Kernels

ResultT = TypeVar("ResultT")

_MATRICES: Final = {"embedding", "linear", "experts", "feed_forward"}
"""Kernels that take matrices and give what multiplies with them."""
_OTHER_FIELDS: Final = {"loaded_dtype", "activation_dtype", "state_dtype", "captured"}
"""Of `Kernels`."""


class KernelTimes:
    """Time spent in each kernel, and calls of it; products by the shape of their matrices.

    Of a step that was captured there is only machine code left: its kernels have the names of the
    compiled functions, and the shapes of the largest arrays that they are given.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._calls: Counter[str] = Counter()

    @contextmanager
    def of_engines(self) -> Iterator[None]:
        """Time the kernels of engines that are loaded meanwhile, and captured steps."""
        with (
            patch("shared.kimi_linear.engine.kernels_for", self._kernels_for),
            patch("shared.kernels.cpu.captured_step.CallSequence", self._timed_calls),
        ):
            yield

    def of(self, work: Callable[[], float]) -> Iterator[str]:
        """Lines of a table: kernels by the time spent in them, then what lies between them."""
        self._seconds.clear()
        self._calls.clear()
        seconds = work()
        yield f"{'kernel':<40}{'calls':>10}{'ms':>12}{'share':>8}"
        for name, spent in sorted(self._seconds.items(), key=lambda item: -item[1]):
            yield f"{name:<40}{self._calls[name]:>10}{1000 * spent:>12.2f}{spent / seconds:>8.1%}"
        rest = seconds - sum(self._seconds.values())
        yield f"{'between kernels':<50}{1000 * rest:>12.2f}{rest / seconds:>8.1%}"
        yield f"{'by the clock':<50}{1000 * seconds:>12.2f}"
        yield ""

    def _kernels_for(self, device_type: str, dtype: WeightDType) -> Kernels:
        """Choose kernels as usual, and time them."""
        kernels = kernels_for(device_type, dtype)
        operations = {
            field.name: getattr(kernels, field.name)
            for field in fields(kernels)
            if field.name not in _OTHER_FIELDS
        }
        timed: dict[str, Any] = {
            name: self._timed_product(name, operation)
            if name in _MATRICES
            else self._timed(name, operation)
            for name, operation in operations.items()
        }
        return replace(kernels, **timed)

    def _timed_calls(self, calls: Iterable[Call]) -> "_TimedCalls":
        return _TimedCalls(
            [self._timed(_name_of(*call), CallSequence([call]).run) for call in calls]
        )

    def _timed_product(self, name: str, make: Callable[..., Callable[..., ResultT]]) -> object:
        def made(*matrices: Tensor) -> Callable[..., ResultT]:
            return self._timed(f"{name} {list(matrices[0].shape)}", make(*matrices))

        return made

    def _timed(self, name: str, operation: Callable[..., ResultT]) -> Callable[..., ResultT]:
        def call(*arguments: object) -> ResultT:
            start = time.perf_counter()
            result = operation(*arguments)
            self._seconds[name] += time.perf_counter() - start
            self._calls[name] += 1
            return result

        return call


class _TimedCalls:
    """A `CallSequence` of which each call is made, and timed, by itself."""

    def __init__(self, calls: Sequence[Callable[[], None]]) -> None:
        self._calls = calls

    def run(self) -> None:
        for call in self._calls:
            call()


def _name_of(code: MachineCode, arguments: tuple[object, ...]) -> str:
    """The kernel's, and the shape of its largest array."""
    arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
    largest = max(arrays, key=lambda array: array.nbytes)
    return f"{code.name} {list(largest.shape)}"


def tables(
    model: Path, dtype: WeightDTypeChoice, threads: int, workload: Workload
) -> Iterator[str]:
    """Give a table for each point of a workload; each runs once before it is profiled."""
    times = KernelTimes()
    with times.of_engines():
        yield from _tables(MeasuredEngine(model, dtype, threads), workload, times)


def _tables(engine: MeasuredEngine, workload: Workload, times: KernelTimes) -> Iterator[str]:
    for tokens in workload.prefill:
        with engine.requests(2, room=tokens) as (first, second):
            engine.prefill(tokens, first)
            yield f"{engine.dtype}, prefill of {tokens} tokens"
            yield from times.of(partial(engine.prefill, tokens, second))
    context, steps = workload.context, workload.steps
    for requests in workload.decode:
        with engine.requests(requests, room=context + 2 * steps) as states:
            for state in states:
                engine.prefill(context, state)
            engine.decode(steps, states)
            yield f"{engine.dtype}, {steps} steps of {requests} requests after {context} tokens"
            yield from times.of(partial(engine.decode, steps, states))
