"""What a body may be, and what becomes of it: a job, or a refusal that names the field."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.completion_request import (
    CompletionRequest,
    make_job,
    parse_completion_request,
)
from services.gateway.error_responses import describe
from services.gateway.served_model import ServedModel
from shared.errors import InvalidRequestError, ModelNotFoundError
from shared.kimi_linear.tokenizer.byte_level import ByteLevelTokenizer, ByteTokenizerFile
from shared.messages import Job, Sampling, decode, encode

TEXT_MODEL = ServedModel(
    name="m",
    created=0,
    vocab_size=512,
    max_length=100,
    end_token_ids=(510,),
    tokenizer=ByteLevelTokenizer(ByteTokenizerFile(vocab_size=512, special_tokens={"<end>": 510})),
)
TOKEN_MODEL = replace(TEXT_MODEL, tokenizer=None)


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion_request(json.dumps({"prompt": "Hello"} | fields).encode())


def job_of(served: ServedModel = TEXT_MODEL, **fields: Any) -> Job:
    return make_job(parse(**fields), served, "r1", "g1", b"")


def refusal_of(served: ServedModel = TEXT_MODEL, **fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        job_of(served, **fields)
    return caught.value


# --- what is accepted ------------------------------------------------------------------------


def test_a_prompt_is_all_that_is_needed() -> None:
    job = job_of()
    assert job.prompt == tuple(b"Hello")
    assert job.max_tokens == 16
    assert job.stop_token_ids == (510,)
    assert job.sampling == Sampling(temperature=1, top_p=1, seed=job.sampling.seed)


def test_every_field_arrives_where_it_belongs() -> None:
    request = parse(
        model="m",
        prompt=[1, 2, 511],
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-2,
        frequency_penalty=0.5,
        logit_bias={"0": 1, "511": -100.0},
        seed=-(2**63),
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=3,
        return_token_ids=True,
        ignore_eos=True,
        user="somebody",
    )
    assert request.stop == ("a", "b")
    assert request.stream
    assert request.stream_options.include_usage
    assert request.return_token_ids
    job = make_job(request, TEXT_MODEL, "r1", "g1", b"")
    assert (job.request_id, job.gateway_id) == ("r1", "g1")
    assert job.prompt == (1, 2, 511)
    assert job.max_tokens == 7
    assert job.stop_token_ids == ()
    assert job.sampling == Sampling(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-2,
        frequency_penalty=0.5,
        logit_bias=((0, 1), (511, -100)),
        seed=-(2**63),
        top_logprobs=3,
    )
    assert decode(encode(job), Job) == job


def test_without_a_seed_each_request_draws_its_own() -> None:
    assert job_of().sampling.seed != job_of().sampling.seed


@pytest.mark.parametrize("field", sorted(CompletionRequest.model_fields.keys() - {"prompt"}))
def test_null_is_the_same_as_absent(field: str) -> None:
    assert parse(**{field: None}) == parse()


@pytest.mark.parametrize("top_k", [-1, 0])
def test_there_are_two_ways_to_ask_for_no_top_k(top_k: int) -> None:
    assert job_of(top_k=top_k).sampling.top_k == 0


def test_one_stop_string_needs_no_list() -> None:
    assert parse(stop="end").stop == ("end",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("best_of", 1),
        ("echo", False),
        ("suffix", ""),
    ],
)
def test_what_is_not_supported_may_be_given_when_it_asks_for_nothing(
    field: str, value: Any
) -> None:
    job_of(**{field: value})


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "16"),
        ("max_tokens", True),
        ("max_tokens", 10**100),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_k", 1.5),
        ("top_k", True),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", "1.1"),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("logit_bias", [5, 1]),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"5.0": 1}),
        ("logit_bias", {"\u0665": 1}),
        ("logit_bias", {"512": 1}),
        ("logit_bias", {"9" * 4000: 1}),
        ("logit_bias", {"5": 100.5}),
        ("logit_bias", {"5": -(10**400)}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": None}),
        ("logit_bias", {str(token_id): 1 for token_id in range(301)}),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop", "x" * 257),
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", True),
        ("stream_options.include_usage", "yes"),
        ("stream_options.other", 1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("return_token_ids", 1),
        ("ignore_eos", "no"),
        ("user", 5),
        ("model", 5),
        ("n", 2),
        ("n", True),
        ("best_of", 3),
        ("echo", True),
        ("echo", 0),
        ("suffix", "tail"),
        ("temprature", 1),
        ("messages", None),
        ("prompt", None),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", 5),
        ("prompt", {}),
        ("prompt", ["a", "b"]),
        ("prompt", ["a"]),
        ("prompt", [[1, 2], [3]]),
        ("prompt", [1, "a"]),
        ("prompt", [1, True]),
        ("prompt", [1.0]),
        ("prompt", [512]),
        ("prompt", [-1]),
        ("prompt", [10**4000]),
        ("prompt", "\ud800"),
    ],
)
def test_a_refused_field_is_named(field: str, value: Any) -> None:
    outer, _, inner = field.partition(".")
    fields: dict[str, Any] = {outer: {inner: value} if inner else value}
    refusal = refusal_of(**fields)
    assert refusal.http_status == 400
    assert refusal.param == field
    assert field in str(refusal)
    assert len(str(refusal)) < 300


def test_a_list_of_prompts_is_told_from_a_wrong_type() -> None:
    assert "one prompt a request" in str(refusal_of(prompt=["a", "b"]))
    assert "token ids" in str(refusal_of(prompt=[1, "a"]))


def test_what_is_not_supported_is_not_called_invalid() -> None:
    assert str(refusal_of(n=2)) == "n: not supported yet; only 1 is"


@pytest.mark.parametrize(
    ("field", "value", "limits"),
    [
        ("top_k", -2, ["-1"]),
        ("min_p", 2, ["1"]),
        ("repetition_penalty", 0, ["0"]),
        ("presence_penalty", 3, ["2"]),
        ("frequency_penalty", -3, ["-2"]),
        ("logit_bias", {"5": 101}, ["-100", "100"]),
        ("logit_bias", {"600": 1}, ["600", "512"]),
        ("logit_bias", {str(token_id): 1 for token_id in range(301)}, ["300"]),
    ],
)
def test_a_refusal_names_the_limit(field: str, value: Any, limits: list[str]) -> None:
    _, _, reason = str(refusal_of(**{field: value})).partition(field)
    assert all(limit in reason for limit in limits)


def test_another_model_is_not_found() -> None:
    refusal = refusal_of(model="gpt-4")
    assert isinstance(refusal, ModelNotFoundError)
    assert refusal.http_status == 404
    assert describe(refusal).error.code == "model_not_found"
    assert refusal.param == "model"


def test_prompt_and_answer_have_to_fit_the_model_together() -> None:
    assert job_of(prompt=[1] * 90, max_tokens=10).max_tokens == 10
    refusal = refusal_of(prompt=[1] * 90, max_tokens=11)
    assert all(number in str(refusal) for number in ("90", "11", "100"))
    assert refusal.param == "max_tokens"
    assert refusal_of(prompt=[1] * 100).param == "prompt"


def test_without_a_tokenizer_token_ids_are_served_and_text_is_not() -> None:
    assert job_of(TOKEN_MODEL, prompt=[5, 6]).prompt == (5, 6)
    assert refusal_of(TOKEN_MODEL, prompt="Hello").param == "prompt"
    assert "no tokenizer" in str(refusal_of(TOKEN_MODEL, prompt="Hello"))
    assert refusal_of(TOKEN_MODEL, prompt=[5], stop="x").param == "stop"


HOSTILE_BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[1]",
    "a string": b'"prompt"',
    "null": b"null",
    "two objects": b"{}{}",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "a number that overflows": b'{"prompt": "a", "temperature": 1e999}',
    "a penalty that overflows": b'{"prompt": "a", "repetition_penalty": 1e999}',
    "a bias that is not a number": b'{"prompt": "a", "logit_bias": {"1": NaN}}',
    "a bias twice": b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}',
    "half a surrogate as a token id": b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}',
    "an integer of 10,000 digits": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "no UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a field twice": b'{"prompt": "a", "prompt": "b"}',
    "a field twice, within": b'{"prompt": "a", "stream_options": {"a": 1, "a": 2}}',
    "half a surrogate as a name": b'{"prompt": "a", "\\ud800": 1}',
    "half a surrogate as a stop string": b'{"prompt": "a", "stop": "\\ud800"}',
    "half a surrogate as a model": b'{"prompt": "a", "model": "\\ud800"}',
    "a megabyte as a name": b'{"prompt": "a", "' + b"x" * 2**20 + b'": 1}',
    "a megabyte as a model": b'{"prompt": "a", "model": "' + b"x" * 2**20 + b'"}',
}


@pytest.mark.parametrize("body", HOSTILE_BODIES.values(), ids=HOSTILE_BODIES.keys())
def test_a_hostile_body_is_refused_in_a_few_words(body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_job(parse_completion_request(body), TEXT_MODEL, "r1", "g1", b"")
    assert len(describe(caught.value).model_dump_json()) < 500
    json.dumps(describe(caught.value).model_dump())


def _job_or_refusal(body: bytes) -> Job | InvalidRequestError:
    """Any other outcome would be a 500."""
    try:
        return make_job(parse_completion_request(body), TEXT_MODEL, "r1", "g1", b"")
    except InvalidRequestError as refusal:
        json.dumps(describe(refusal).model_dump())
        return refusal


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_are_too_strange(body: bytes) -> None:
    assert isinstance(_job_or_refusal(body), InvalidRequestError)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", 0, 1, 2**63, 2**64, 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELD_NAMES = st.sampled_from(sorted(CompletionRequest.model_fields)) | st.text()


@settings(deadline=None)
@given(st.dictionaries(FIELD_NAMES, JSON_VALUES, max_size=6))
def test_no_json_is_too_strange(fields: dict[str, Any]) -> None:
    _job_or_refusal(json.dumps(fields).encode())


@settings(deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=20)
    | st.lists(st.integers(0, 511), min_size=1, max_size=20),
    max_tokens=st.integers(1, 16),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**31 - 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 511), st.floats(-100, 100), max_size=300),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
)
def test_everything_in_range_becomes_a_job(prompt: str | list[int], **fields: Any) -> None:
    fields["logit_bias"] = {str(token_id): bias for token_id, bias in fields["logit_bias"].items()}
    job = _job_or_refusal(json.dumps({"prompt": prompt} | fields).encode())
    assert isinstance(job, Job)
    assert job.prompt == tuple(prompt.encode() if isinstance(prompt, str) else prompt)
    assert job.sampling.seed == fields["seed"]
    assert decode(encode(job), Job) == job
