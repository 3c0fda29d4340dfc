"""POST /v1/completions: body -> CompletionRequest -> Job -> TokenEvents -> Completion -> client."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from services.gateway.completion_request import (
    CompletionRequest,
    make_job,
    parse_completion_request,
)
from services.gateway.completion_response import Completion, CompletionWriter
from services.gateway.completion_text import CompletionText, TextPiece
from services.gateway.error_responses import REQUEST_ID, describe, log_failure
from services.gateway.event_stream import EventStream
from services.gateway.generation import Generation, Generations
from services.gateway.metrics import GatewayMetrics, Measurement
from services.gateway.request_body import read_json_body
from services.gateway.served_model import ServedModel
from services.gateway.tenant import tenant_of
from shared.errors import DeadlineExceededError
from shared.messages import Job, TokenEvent
from shared.settings import GatewaySettings


class CompletionsEndpoint:
    """Answers completion requests, whole or as a stream."""

    def __init__(
        self,
        model: ServedModel,
        gateway_id: str,
        generations: Generations,
        metrics: GatewayMetrics,
        settings: GatewaySettings,
    ) -> None:
        self._model = model
        self._gateway_id = gateway_id
        self._generations = generations
        self._metrics = metrics
        self._request_timeout = settings.request_timeout
        self._share_prefixes = settings.share_prefixes

    async def create(self, http_request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        deadline = asyncio.get_running_loop().time() + self._request_timeout
        with self._metrics.measuring() as measurement:
            request, job = await self._read(http_request)
            measurement.accepted(len(job.prompt))
            answer = _Answer(request, job, self._model, measurement)
            if request.stream:
                return await self._stream(EventStream(http_request), answer, deadline)
            async with self._generating(job, deadline) as generation:
                completion = await answer.whole(generation)
            return web.Response(text=completion.json_text(), content_type="application/json")

    async def _read(self, http_request: web.Request) -> tuple[CompletionRequest, Job]:
        body = await read_json_body(http_request)
        # A long prompt takes a while to parse and to tokenise: other streams go on meanwhile.
        request = await asyncio.to_thread(parse_completion_request, body)
        job = await asyncio.to_thread(
            make_job,
            request,
            self._model,
            http_request[REQUEST_ID],
            self._gateway_id,
            tenant_of(http_request, share_prefixes=self._share_prefixes),
        )
        return request, job

    async def _stream(
        self, stream: EventStream, answer: "_Answer", deadline: float
    ) -> web.StreamResponse:
        try:
            async with self._generating(answer.job, deadline) as generation:
                await answer.stream(generation, stream)
        except ConnectionResetError:  # the client left
            raise
        except Exception as error:
            if not stream.started:
                raise
            log_failure(error)
            answer.measurement.failed(error)
            await stream.fail(describe(error).model_dump_json())
        return stream.response

    @asynccontextmanager
    async def _generating(self, job: Job, deadline: float) -> AsyncIterator[Generation]:
        try:
            async with asyncio.timeout_at(deadline), self._generations.start(job) as generation:
                yield generation
        except TimeoutError:
            raise DeadlineExceededError(
                f"the request took longer than {self._request_timeout:g} seconds"
            ) from None


class _Answer:
    """What one accepted request is answered."""

    def __init__(
        self, request: CompletionRequest, job: Job, model: ServedModel, measurement: Measurement
    ) -> None:
        self.job = job
        self.measurement = measurement
        self._include_usage = request.stream_options.include_usage
        self._text = CompletionText(model.tokenizer, request.stop)
        self._writer = CompletionWriter(request, job, model)

    async def whole(self, generation: Generation) -> Completion:
        """Wait for the whole text."""
        pieces: list[TextPiece] = []
        while not self._text.finished:
            event = await generation.next_event()
            if event is not None:
                pieces.append(self._add(event))
        return self._writer.whole(pieces)

    async def stream(self, generation: Generation, stream: EventStream) -> None:
        """Pass the text on as it comes."""
        while not self._text.finished:
            event = await generation.next_event()
            if event is None:
                await stream.ping()
            else:
                await stream.send(self._writer.chunk(self._add(event)).json_text())
        if self._include_usage:
            await stream.send(self._writer.usage_chunk().json_text())
        await stream.end()

    def _add(self, event: TokenEvent) -> TextPiece:
        piece = self._text.push(event)
        self.measurement.generated(len(piece.tokens), piece.finish_reason)
        return piece
