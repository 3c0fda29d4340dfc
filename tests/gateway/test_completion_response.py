"""The objects clients parse: OpenAI's fields, vLLM's token ids, llama.cpp's timings."""

import json
from typing import Any

from services.gateway.completion_request import make_job, parse_completion_request
from services.gateway.completion_response import CompletionWriter, token_text
from services.gateway.completion_text import CompletionText
from services.gateway.served_model import ServedModel
from shared.kimi_linear.tokenizer.byte_level import ByteLevelTokenizer, ByteTokenizerFile
from shared.messages import FinishReason, Token, TokenEvent
from tests.gateway.decode_peer import TIMINGS

TOKENIZER = ByteLevelTokenizer(ByteTokenizerFile(vocab_size=512))


class Answer:
    """One request's text and writer."""

    def __init__(self, *, with_tokenizer: bool = True, **fields: Any) -> None:
        model = ServedModel("m", 0, 512, 100, (), TOKENIZER if with_tokenizer else None)
        request = parse_completion_request(json.dumps({"prompt": [1, 2]} | fields).encode())
        job = make_job(request, model, "r1", "g1", b"")
        self.text = CompletionText(model.tokenizer, request.stop)
        self.writer = CompletionWriter(request, job, model)
        self.index = 0

    def chunk(self, tokens: list[Token], finish_reason: FinishReason | None = None) -> Any:
        event = TokenEvent(
            request_id="r1",
            index=self.index,
            tokens=tuple(tokens),
            finish_reason=finish_reason,
            timings=TIMINGS if finish_reason else None,
        )
        self.index += len(tokens)
        return json.loads(self.writer.chunk(self.text.push(event)).json_text())


def plain(text: str) -> list[Token]:
    return [Token(token_id=byte) for byte in text.encode()]


def test_a_chunk_has_openais_fields_and_no_others() -> None:
    chunk = Answer().chunk(plain("Hi"))
    created = chunk.pop("created")
    assert isinstance(created, int)
    assert chunk == {
        "id": "cmpl-r1",
        "object": "text_completion",
        "model": "m",
        "choices": [{"index": 0, "text": "Hi", "logprobs": None, "finish_reason": None}],
    }


def test_the_last_chunk_has_the_reason_and_the_timings() -> None:
    answer = Answer()
    assert "timings" not in answer.chunk(plain("Hi"))
    last = answer.chunk([], "stop")
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["timings"] == TIMINGS.model_dump()


def test_usage_comes_in_a_chunk_of_its_own_and_is_null_before() -> None:
    answer = Answer(stream_options={"include_usage": True})
    assert answer.chunk(plain("Hi"), "length")["usage"] is None
    last = json.loads(answer.writer.usage_chunk().json_text())
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_token_ids_are_those_of_the_chunk_and_the_prompts_come_once() -> None:
    answer = Answer(return_token_ids=True)
    first = answer.chunk(plain("H"))["choices"][0]
    second = answer.chunk(plain("i"))["choices"][0]
    assert (first["token_ids"], first["prompt_token_ids"]) == ([ord("H")], [1, 2])
    assert second["token_ids"] == [ord("i")]
    assert "prompt_token_ids" not in second


def test_without_a_tokenizer_token_ids_are_always_there() -> None:
    choice = Answer(with_tokenizer=False).chunk(plain("Hi"))["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("", [72, 105])


def test_logprobs_name_tokens_by_their_text_and_include_the_drawn_one() -> None:
    half = "é".encode()[0]
    tokens = [
        Token(token_id=ord("a"), logprob=-1.0, top_logprobs=((ord("b"), -0.5), (ord("a"), -1.0))),
        Token(token_id=half, logprob=-9.0, top_logprobs=((ord("c"), -0.1), (300, -0.2))),
    ]
    logprobs = Answer(logprobs=2).chunk(tokens)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "bytes:\\xc3"],
        "token_logprobs": [-1.0, -9.0],
        "top_logprobs": [
            {"b": -0.5, "a": -1.0},
            {"c": -0.1, "token_id:300": -0.2, "bytes:\\xc3": -9.0},
        ],
        "text_offset": [0, 1],
    }


def test_zero_logprobs_are_those_of_the_drawn_tokens_only() -> None:
    logprobs = Answer(logprobs=0).chunk([Token(token_id=97, logprob=-1.5)])["choices"][0][
        "logprobs"
    ]
    assert (logprobs["token_logprobs"], logprobs["top_logprobs"]) == ([-1.5], None)


def test_an_impossible_token_still_gives_valid_json() -> None:
    tokens = [Token(token_id=97, logprob=float("-inf"))]
    logprobs = Answer(logprobs=0).chunk(tokens)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None]


def test_a_token_without_text_is_named_by_its_id() -> None:
    assert token_text(300, TOKENIZER) == "token_id:300"
    assert token_text(97, None) == "token_id:97"
    assert token_text(97, TOKENIZER) == "a"
