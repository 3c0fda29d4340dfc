"""How to reach Redis: time limits on every wait, and which errors pass by themselves."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import structlog
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

log = structlog.get_logger()

PASSING_ERRORS: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.BusyLoadingError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    OSError,
)
"""Errors of Redis that pass by themselves: it is away, starting, full, or changing its role."""

_PASSING_ANSWERS: Final = ("NOREPLICAS ", "MISCONF ", "BUSY Redis", "BUSY Valkey", "MASTERDOWN ")
"""Answers of a server that cannot write for now, for which the client has no exception."""

BLOCK_MILLISECONDS: Final = 1000
"""Longest wait inside Redis; below the time limit, so that silence means a dead peer."""

_COMMAND_SECONDS: Final = 10.0
_SHORTEST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0

Answer = TypeVar("Answer")


@contextmanager
def passing_answers_as_errors() -> Iterator[None]:
    """Turn an answer of a server that cannot serve for now into a `ConnectionError`."""
    try:
        yield
    except exceptions.ResponseError as error:
        if any(answer in str(error) for answer in _PASSING_ANSWERS):
            raise exceptions.ConnectionError(str(error)) from error
        raise


class _LimitedPipeline(Pipeline):
    """A pipeline that ends within the time limit, whatever its server does."""

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with passing_answers_as_errors():
            async with asyncio.timeout(_COMMAND_SECONDS):
                return await super().execute(raise_on_error)


class _LimitedRedis(Redis):
    """A client whose every command ends within the time limit, whatever its server does.

    The client's own limit, `socket_timeout`, is not used: on Python 3.11 it loses a cancellation
    that comes while a command is being sent (`asyncio.wait_for`, CPython issue 81839).
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with passing_answers_as_errors():
            async with asyncio.timeout(_COMMAND_SECONDS):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _LimitedPipeline(
            self.connection_pool, self.response_callbacks, transaction, shard_hint
        )


def connect(url: str, connections: int = 64) -> Redis:
    """Make a client of at most `connections` connections; the next caller waits for one."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=_COMMAND_SECONDS,
        socket_timeout=None,
        socket_connect_timeout=5.0,
        health_check_interval=15,
        protocol=2,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3),
        # A write to a connection that was reset is a RuntimeError on uvloop: nothing was sent.
        retry_on_error=[exceptions.BusyLoadingError, RuntimeError],
    )
    return _LimitedRedis.from_pool(pool)


def without_password(url: str) -> str:
    """Give the URL in a form that may be logged."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username or ''}:***@{host}").geturl()


def entries_of(answer: Any) -> list[tuple[str, dict[bytes, bytes]]]:
    """Entries that a read of one stream gave, which is nothing at all when it waited in vain."""
    return [(entry.decode(), fields) for _, entries in answer or [] for entry, fields in entries]


async def insist(ask: Callable[[], Awaitable[Answer]], what: str) -> Answer:
    """Ask until an answer comes, across outages of Redis, for as long as the caller lives."""
    pause = _SHORTEST_PAUSE
    while True:
        try:
            return await ask()
        except PASSING_ERRORS as error:
            log.warning(
                "redis unavailable",
                during=what,
                error=type(error).__name__,
                reason=str(error),
                retry_in=pause,
            )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


async def repeat(step: Callable[[], Awaitable[None]], what: str) -> None:
    """Run a step again and again for as long as the caller lives, also across outages of Redis."""
    while True:
        await insist(step, what)
