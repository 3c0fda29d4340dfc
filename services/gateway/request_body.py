"""Reads a request's body: JSON of bounded size that arrives in bounded time."""

import asyncio
from typing import Final

from aiohttp import web

from shared.errors import InvalidRequestError, RequestTooLargeError

_ARRIVAL_SECONDS: Final = 60.0


async def read_json_body(request: web.Request) -> bytes:
    """Read the body of a request that says it is JSON.

    Raises:
        InvalidRequestError: it is something else, is cut off or damaged, or comes too slowly.
        RequestTooLargeError: it is larger than the application's limit.
    """
    if request.content_type != "application/json":
        raise InvalidRequestError(
            f"the content type has to be application/json, not {request.content_type:.80}"
        )
    try:
        async with asyncio.timeout(_ARRIVAL_SECONDS):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise RequestTooLargeError(str(error.text)) from None
    except web.RequestPayloadError:
        raise InvalidRequestError("the body is cut off or damaged") from None
    except TimeoutError:
        raise InvalidRequestError(
            f"the body did not arrive within {_ARRIVAL_SECONDS:g} seconds"
        ) from None
