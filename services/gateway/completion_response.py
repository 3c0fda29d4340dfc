"""The objects of OpenAI's completions API, with vLLM's token ids and llama.cpp's timings."""

import time
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from services.gateway.completion_request import CompletionRequest
from services.gateway.completion_text import EndReason, TextPiece, join
from services.gateway.served_model import ServedModel
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.messages import Job, Timings, Token


class _ResponsePart(BaseModel):
    """Fields that were not set are not sent: clients tell "absent" from null."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptTokensDetails(_ResponsePart):
    """What the prompt's tokens were."""

    cached_tokens: int
    """Those whose state was there before and not computed again."""


class Usage(_ResponsePart):
    """What the request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Logprobs(_ResponsePart):
    """Log probabilities in the form of the completions API, one entry a token in every list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class Choice(_ResponsePart):
    """The text, or the new part of it."""

    index: Literal[0] = 0
    text: str
    logprobs: Logprobs | None
    finish_reason: EndReason | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class Completion(_ResponsePart):
    """A whole completion, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    timings: Timings | None = None

    def json_text(self) -> str:
        """The object as it is sent."""
        return self.model_dump_json(exclude_unset=True)


class CompletionWriter:
    """Writes the pieces of one request's text as completion objects."""

    def __init__(self, request: CompletionRequest, job: Job, model: ServedModel) -> None:
        self._request = request
        self._job = job
        self._model = model
        self._created = int(time.time())
        self._returns_token_ids = request.return_token_ids or model.tokenizer is None
        self._written_tokens = 0
        self._cached_tokens = 0
        self._began = False

    def whole(self, pieces: Sequence[TextPiece]) -> Completion:
        """The answer to a request that does not stream."""
        piece = join(pieces)
        completion = self._completion([self._choice(piece)])
        return completion.model_copy(update={"usage": self._usage(), **_timings(piece)})

    def chunk(self, piece: TextPiece) -> Completion:
        """The next part of a stream."""
        chunk = self._completion([self._choice(piece)])
        return chunk.model_copy(update={**self._no_usage_yet(), **_timings(piece)})

    def usage_chunk(self) -> Completion:
        """The part of a stream that tells, after the text, what it cost."""
        return self._completion([]).model_copy(update={"usage": self._usage()})

    def _completion(self, choices: list[Choice]) -> Completion:
        return Completion(
            id=f"cmpl-{self._job.request_id}",
            object="text_completion",
            created=self._created,
            model=self._model.name,
            choices=choices,
        )

    def _choice(self, piece: TextPiece) -> Choice:
        choice = Choice(
            index=0,
            text=piece.text,
            logprobs=None if self._request.logprobs is None else self._logprobs(piece),
            finish_reason=piece.finish_reason,
        )
        self._written_tokens += len(piece.tokens)
        self._cached_tokens += piece.cached_tokens or 0
        if not self._returns_token_ids:
            return choice
        token_ids: dict[str, list[int]] = {"token_ids": [token.token_id for token in piece.tokens]}
        if not self._began:
            token_ids["prompt_token_ids"] = list(self._job.prompt)
            self._began = True
        return choice.model_copy(update=token_ids)

    def _logprobs(self, piece: TextPiece) -> Logprobs:
        tokenizer = self._model.tokenizer
        return Logprobs(
            tokens=[token_text(token.token_id, tokenizer) for token in piece.tokens],
            token_logprobs=[token.logprob for token in piece.tokens],
            top_logprobs=(
                [_alternatives(token, tokenizer) for token in piece.tokens]
                if self._request.logprobs
                else None
            ),
            text_offset=list(piece.offsets),
        )

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self._job.prompt),
            completion_tokens=self._written_tokens,
            total_tokens=len(self._job.prompt) + self._written_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens),
        )

    def _no_usage_yet(self) -> dict[str, None]:
        return {"usage": None} if self._request.stream_options.include_usage else {}


def token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    """Name a token by its text; by its bytes or its id where it has none of its own."""
    data = tokenizer.token_bytes(token_id) if tokenizer else b""
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _alternatives(token: Token, tokenizer: Tokenizer | None) -> dict[str, float]:
    """The most likely tokens, and the one that was drawn even if it is none of them."""
    likely = [*token.top_logprobs]
    if token.logprob is not None:
        likely.append((token.token_id, token.logprob))
    return {token_text(token_id, tokenizer): logprob for token_id, logprob in likely}


def _timings(piece: TextPiece) -> dict[str, Timings]:
    return {} if piece.timings is None else {"timings": piece.timings}
