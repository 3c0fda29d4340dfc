"""The one place where an exception becomes OpenAI's error object."""

import traceback
import uuid
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from aiohttp import web
from pydantic import BaseModel, ConfigDict

from shared.errors import InvalidRequestError, OverloadedError, PrfaasError

log = structlog.get_logger()

REQUEST_ID: Final = web.RequestKey("request_id", str)
REQUEST_ID_HEADER: Final = "X-Request-Id"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ErrorDescription(BaseModel):
    """What a client is told of an error."""

    model_config = ConfigDict(frozen=True)

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorObject(BaseModel):
    """The body of every answer that is an error."""

    model_config = ConfigDict(frozen=True)

    error: ErrorDescription


def describe(error: Exception) -> ErrorObject:
    """Say what went wrong; of an error that nobody expected, only that it happened."""
    if not isinstance(error, PrfaasError):
        return ErrorObject(error=ErrorDescription(message="internal error", type=PrfaasError.kind))
    param = error.param if isinstance(error, InvalidRequestError) else None
    return ErrorObject(
        error=ErrorDescription(message=str(error), type=error.kind, param=param, code=error.code)
    )


def log_failure(error: Exception) -> None:
    """Log an error by the rule that neither its message nor its frames may hold a prompt."""
    if isinstance(error, PrfaasError):
        log.info("request failed", kind=error.kind, status=error.http_status, reason=str(error))
        return
    log.error(
        "request failed unexpectedly",
        error=type(error).__name__,
        frames="".join(traceback.format_tb(error.__traceback__)),
    )


@web.middleware
async def name_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give a request its identifier, for its job, its answer and its log lines."""
    request[REQUEST_ID] = uuid.uuid4().hex
    with structlog.contextvars.bound_contextvars(request=request[REQUEST_ID]):
        return await handler(request)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Tell a request's identifier in its answer, whatever kind of answer it is."""
    if REQUEST_ID in request:
        response.headers[REQUEST_ID_HEADER] = request[REQUEST_ID]


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an answer."""
    try:
        return await handler(request)
    except PrfaasError as error:
        log_failure(error)
        headers = (
            {"Retry-After": str(error.retry_after)} if isinstance(error, OverloadedError) else {}
        )
        return _answer(describe(error), error.http_status, headers)
    except web.HTTPException as error:
        return _answer_http_exception(request, error)
    except ConnectionResetError:  # the client left: there is nobody to answer
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, a client gets an answer
        log_failure(error)
        return _answer(describe(error), PrfaasError.http_status, {})


def _answer_http_exception(request: web.Request, error: web.HTTPException) -> web.Response:
    """Answer what aiohttp itself refuses: unknown routes and methods."""
    message = f"{request.method:.20} {request.path:.200}: {error.reason}"
    allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    description = ErrorDescription(message=message, type=InvalidRequestError.kind)
    return _answer(ErrorObject(error=description), error.status, allow)


def _answer(body: ErrorObject, status: int, headers: dict[str, str]) -> web.Response:
    return web.json_response(body.model_dump(), status=status, headers=headers)
