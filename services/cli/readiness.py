"""Asks services whether they are alive and ready."""

import asyncio
from typing import Final

import aiohttp
from pydantic import BaseModel, ValidationError

_POLL_SECONDS: Final = 0.1
_PROBE_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)
NO_ANSWER: Final = "does not answer"


class _ReadyAnswer(BaseModel):
    reason: str = ""


async def is_alive(session: aiohttp.ClientSession, url: str) -> bool:
    """Tell whether the service at a base URL answers GET /health with 200."""
    try:
        async with session.get(f"{url}/health", timeout=_PROBE_TIMEOUT) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def reason_not_ready(session: aiohttp.ClientSession, url: str) -> str | None:
    """Why the service at a base URL cannot serve now, or None if it can."""
    try:
        async with session.get(f"{url}/ready", timeout=_PROBE_TIMEOUT) as response:
            if response.status == 200:
                return None
            return _ReadyAnswer.model_validate_json(await response.read()).reason
    except ValidationError:
        return "GET /ready is not answered as by a service of prfaas"
    except (aiohttp.ClientError, TimeoutError):
        return NO_ANSWER


async def wait_until_ready(session: aiohttp.ClientSession, url: str) -> None:
    """Wait until the service at a base URL can serve; the caller limits the wait."""
    while await reason_not_ready(session, url) is not None:  # noqa: ASYNC110 - it is elsewhere
        await asyncio.sleep(_POLL_SECONDS)
