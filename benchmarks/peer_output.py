"""What llama.cpp's benchmark programs print, a JSON object a line."""

from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from benchmarks.measurement import Point, Speed
from benchmarks.programs import ProgramError


class _Prefill(BaseModel):
    """A result of `llama-bench`."""

    model_config = ConfigDict(frozen=True)

    n_prompt: PositiveInt
    n_gen: Literal[0]
    avg_ts: PositiveFloat
    """Tokens of the prompt a second."""


class _Decode(BaseModel):
    """A result of `llama-batched-bench`."""

    model_config = ConfigDict(frozen=True)

    pl: PositiveInt
    """Requests."""
    speed_tg: PositiveFloat
    """Tokens a second generated for all of them, without the time that their prompts took."""


Result = TypeVar("Result", bound=BaseModel)


def prefill_speed(output: str) -> Speed:
    """Read what `llama-bench -o jsonl` printed for one prompt.

    Raises:
        ProgramError: it is anything but one result of a prefill.
    """
    result = _only_result(_Prefill, output)
    point = Point(phase="prefill", size=result.n_prompt)
    return Speed(point=point, tokens_per_second=result.avg_ts)


def decode_speed(output: str) -> Speed:
    """Read what `llama-batched-bench --output-format jsonl` printed for one number of requests.

    Raises:
        ProgramError: it is anything but one result.
    """
    result = _only_result(_Decode, output)
    point = Point(phase="decode", size=result.pl)
    return Speed(point=point, tokens_per_second=result.speed_tg)


def _only_result(kind: type[Result], output: str) -> Result:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if len(lines) != 1:
        raise ProgramError(f"llama.cpp printed {len(lines)} results, expected one")
    try:
        return kind.model_validate_json(lines[0])
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "JSON"
        raise ProgramError(f"llama.cpp's result: {field}: {problem['msg']}") from None
