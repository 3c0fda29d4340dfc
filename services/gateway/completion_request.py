"""The body of POST /v1/completions, checked field by field, and the job that it becomes.

Pure: bytes in, values or an `InvalidRequestError` that names the field out.
"""

import json
import re
import secrets
from collections.abc import Iterable
from typing import Annotated, Any, Final, NoReturn

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from services.gateway.served_model import ServedModel
from shared.errors import InvalidRequestError, ModelNotFoundError
from shared.messages import LARGEST_BIAS, MOST_BIASED_TOKENS, Job, Penalty, Sampling

MOST_STOP_STRINGS: Final = 4
LONGEST_STOP_STRING: Final = 256

_LONGEST_SHOWN_NAME: Final = 80

_TOKEN_ID: Final = re.compile(r"0|[1-9][0-9]{0,9}")

_NEUTRAL: Final[dict[str, object]] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
}
"""Fields of OpenAI's that have no effect here, with the one value that asks for none."""


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """One request as OpenAI and vLLM write it; a field that is null counts as absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str | tuple[int, ...]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 16
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_token_ids: bool = False
    ignore_eos: bool = False
    user: str | None = None

    n: object = None
    best_of: object = None
    echo: object = None
    suffix: object = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompt_is_one_text_or_its_tokens(cls, value: object) -> str | tuple[int, ...]:
        if isinstance(value, str) and not _has_utf8(value):
            raise PydanticCustomError("prompt", "it has half of a surrogate pair")
        if value in ("", []):
            raise PydanticCustomError("prompt", "it must not be empty")
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(type(item) is int for item in value):
            return tuple(value)
        if isinstance(value, list) and all(isinstance(item, str | list) for item in value):
            raise PydanticCustomError("prompt", "one prompt a request, not a list of prompts")
        raise PydanticCustomError("prompt", "it has to be a string or a list of token ids")

    @field_validator("stop", mode="plain")
    @classmethod
    def _stops_are_a_few_short_strings(cls, value: object) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MOST_STOP_STRINGS:
            raise PydanticCustomError(
                "stop",
                "it has to be a string or a list of at most {most} strings",
                {"most": MOST_STOP_STRINGS},
            )
        if not all(_can_stop(stop) for stop in stops):
            raise PydanticCustomError(
                "stop",
                "each stop string has to have 1 to {longest} characters",
                {"longest": LONGEST_STOP_STRING},
            )
        return tuple(stops)

    @field_validator("logit_bias", mode="plain")
    @classmethod
    def _biases_are_numbers_by_token_id(cls, value: object) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, dict) or len(value) > MOST_BIASED_TOKENS:
            raise PydanticCustomError(
                "logit_bias",
                "it has to be an object with at most {most} token ids as names",
                {"most": MOST_BIASED_TOKENS},
            )
        if not all(_TOKEN_ID.fullmatch(name) for name in value):
            raise PydanticCustomError("logit_bias", 'each name has to be a token id, like "50"')
        if not all(_is_bias(bias) for bias in value.values()):
            raise PydanticCustomError(
                "logit_bias",
                "each bias has to be a number from -{largest} to {largest}",
                {"largest": LARGEST_BIAS},
            )
        return tuple((int(name), float(bias)) for name, bias in value.items())

    @field_validator(*_NEUTRAL)
    @classmethod
    def _only_the_neutral_value_is_supported(cls, value: object, info: ValidationInfo) -> object:
        neutral = _NEUTRAL[info.field_name or ""]
        # True equals 1 in Python, and not in JSON.
        if value != neutral or isinstance(value, bool) != isinstance(neutral, bool):
            raise PydanticCustomError(
                "unsupported", "not supported yet; only {neutral} is", {"neutral": neutral}
            )
        return value


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Read the request out of its body.

    Raises:
        InvalidRequestError: the body is not a JSON object, or a field is missing, unknown, of the
            wrong type, out of range or not supported.
    """
    content = _parse_json(body)
    if not isinstance(content, dict):
        raise InvalidRequestError("the body has to be a JSON object")
    given = {
        name: value
        for name, value in content.items()
        if value is not None or name not in CompletionRequest.model_fields
    }
    try:
        return CompletionRequest.model_validate(given)
    except ValidationError as error:
        raise _refusal(error.errors(include_input=False, include_url=False)[0]) from None


def make_job(
    request: CompletionRequest,
    model: ServedModel,
    request_id: str,
    gateway_id: str,
    tenant: bytes,
) -> Job:
    """Tokenise a request and hold it against what the model can do.

    Raises:
        InvalidRequestError: the model has another name, no tokenizer or not all the tokens, or the
            prompt does not fit.
    """
    if request.model not in (None, model.name):
        raise ModelNotFoundError(
            f"the model {_shown(request.model)!r} does not exist; {model.name!r} does", "model"
        )
    if request.stop and model.tokenizer is None:
        raise InvalidRequestError("stop: this model has no tokenizer, so no text to find", "stop")
    prompt = _prompt_token_ids(request.prompt, model)
    _refuse_unknown((token_id for token_id, _ in request.logit_bias), model, "logit_bias")
    if len(prompt) + request.max_tokens > model.max_length:
        raise InvalidRequestError(
            f"the prompt of {len(prompt)} tokens and max_tokens of {request.max_tokens} are "
            f"together over the model's limit of {model.max_length} tokens",
            "prompt" if len(prompt) >= model.max_length else "max_tokens",
        )
    return Job(
        request_id=request_id,
        gateway_id=gateway_id,
        prompt=prompt,
        sampling=Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=max(0, request.top_k),
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            top_logprobs=request.logprobs,
        ),
        max_tokens=request.max_tokens,
        stop_token_ids=() if request.ignore_eos else model.end_token_ids,
        tenant=tenant,
    )


def _prompt_token_ids(prompt: str | tuple[int, ...], model: ServedModel) -> tuple[int, ...]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise InvalidRequestError(
                "prompt: this model has no tokenizer; send a list of token ids", "prompt"
            )
        return model.tokenizer.encode(prompt)
    _refuse_unknown(prompt, model, "prompt")
    return prompt


def _refuse_unknown(token_ids: Iterable[int], model: ServedModel, param: str) -> None:
    outside = next((item for item in token_ids if not 0 <= item < model.vocab_size), None)
    if outside is not None:
        raise InvalidRequestError(
            f"{param}: token id {_shown(str(outside))} is outside the vocabulary of "
            f"{model.vocab_size}",
            param,
        )


def _is_bias(value: Any) -> bool:
    # True is an integer in Python, and no number in JSON.
    return type(value) in (int, float) and abs(value) <= LARGEST_BIAS


def _can_stop(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= LONGEST_STOP_STRING and _has_utf8(value)


def _has_utf8(text: str) -> bool:
    """JSON can escape half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- JSON, strictly --------------------------------------------------------------------------


def _parse_json(body: bytes) -> object:
    try:
        return json.loads(
            body.decode(), object_pairs_hook=_unique_names, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    except ValueError:  # Python reads integers up to a few thousand digits
        raise InvalidRequestError("the body has a number that is too long") from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequestError(f"{_shown(name)} is there twice", _shown(name))
            seen.add(name)
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"the body is not valid JSON: {name} is no number")


# --- refusals --------------------------------------------------------------------------------


def _refusal(details: ErrorDetails) -> InvalidRequestError:
    param = _shown(".".join(map(str, details["loc"])))
    if not param:  # a name that is no text, so that nothing can be said of where it stands
        return InvalidRequestError("the body has a field whose name is not valid Unicode")
    match details["type"]:
        case "extra_forbidden":
            message = f"{param} is not a field of a completion request"
        case "missing":
            message = f"{param} is required"
        case _:
            message = f"{param}: {details['msg']}"
    return InvalidRequestError(message, param)


def _shown(name: str | None) -> str:
    """A client's own words may be as long as its body; an answer repeats only their beginning."""
    return str(name)[:_LONGEST_SHOWN_NAME]
