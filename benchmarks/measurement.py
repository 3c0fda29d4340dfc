"""What is measured, and what comes out of it: values that go between processes as JSON."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from shared.kernels.dtypes import WeightDType


class Point(BaseModel):
    """One figure of a comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Literal["prefill", "decode"]
    size: PositiveInt
    """Tokens of the prompt that is prefilled, or requests that are decoded together."""

    def __str__(self) -> str:
        return f"{self.phase} {self.size}"


class Workload(BaseModel):
    """The same work for every engine that is compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: tuple[PositiveInt, ...]
    """Lengths of prompts, each prefilled on its own."""
    decode: tuple[PositiveInt, ...]
    """Numbers of requests that are decoded together."""
    context: PositiveInt = 512
    """Tokens of each request's prompt when decoding begins; their prefill is not timed."""
    steps: PositiveInt = 32
    """Tokens that are decoded for each request."""

    @property
    def points(self) -> tuple[Point, ...]:
        """Every figure asked for, in the order of the table."""
        return (
            *(Point(phase="prefill", size=tokens) for tokens in self.prefill),
            *(Point(phase="decode", size=requests) for requests in self.decode),
        )


class Speed(BaseModel):
    """One measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    point: Point
    tokens_per_second: PositiveFloat
    """Of the prompt, or generated for all requests together."""


class MemoryUse(BaseModel):
    """Memory of the engine's process at the end of a prefill, its state included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: NonNegativeInt
    """0: the model is loaded and has computed nothing yet."""
    peak_bytes: PositiveInt
    """The most that was resident since the prefill began, mapped files included."""
    anonymous_bytes: PositiveInt
    """Resident afterwards and backed by no file."""


class EngineRun(BaseModel):
    """What one process measured of our engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: WeightDType
    """Of the weights: the engine's own choice if that was left to it."""
    speeds: tuple[Speed, ...]
    memory: tuple[MemoryUse, ...]
    """In the order of the prompts' lengths; empty where the system does not tell."""
