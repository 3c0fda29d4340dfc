"""What a kv_store answers: the states, the prefix cache and the links of its region."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Final

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.kv_store.sweeping import Sweeper
from shared.policy.link_estimate import LinkEstimate
from shared.streams.connection import PASSING_ERRORS
from shared.streams.link_statistics import LinkStatistics
from shared.streams.prefix_index import MOST_BLOCKS, PrefixIndex
from shared.streams.state_store import StateStore

MAX_BODY_BYTES: Final = 2**20
"""Room for the names of `MOST_BLOCKS` blocks."""

_ARRIVAL_SECONDS: Final = 10.0

Handler = Callable[[web.Request], Awaitable[web.Response]]


class MatchQuery(BaseModel):
    """Body of POST /v1/cache/match."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")], ...], Field(max_length=MOST_BLOCKS)
    ]
    """Names of a prompt's whole blocks, shortest first, in hexadecimal."""


class KvStoreEndpoints:
    """Answers from what is in Redis at that moment."""

    def __init__(
        self, store: StateStore, index: PrefixIndex, links: LinkStatistics, sweeper: Sweeper
    ) -> None:
        self._store = store
        self._index = index
        self._links = links
        self._sweeper = sweeper

    def add_routes(self, application: web.Application) -> None:
        """Give an application the endpoints."""
        router = application.router
        router.add_get("/v1/states", _answering_outages(self._states))
        router.add_get("/v1/cache", _answering_outages(self._cache))
        router.add_delete("/v1/cache", _answering_outages(self._drop_cache))
        router.add_post("/v1/cache/match", _answering_outages(self._match))
        router.add_get("/v1/links", _answering_outages(self._link_list))

    async def _states(self, _: web.Request) -> web.Response:
        """GET /v1/states: what the leased states weigh now."""
        return web.json_response(asdict(await self._store.account()))

    async def _cache(self, _: web.Request) -> web.Response:
        """GET /v1/cache: what the prefix cache holds now, and did so far."""
        account, counts = await self._index.account(), await self._index.counts()
        return web.json_response(asdict(account) | asdict(counts))

    async def _drop_cache(self, _: web.Request) -> web.Response:
        """DELETE /v1/cache: evict everything that no request uses."""
        freed = await self._sweeper.drop_unpinned()
        return web.json_response({"freed_bytes": freed} | asdict(await self._index.account()))

    async def _match(self, request: web.Request) -> web.Response:
        """POST /v1/cache/match: what a prompt would find, without any effect."""
        try:
            async with asyncio.timeout(_ARRIVAL_SECONDS):
                query = MatchQuery.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            return _refuse(f"{where:.100}: {first['msg']}")
        except web.RequestPayloadError:
            return _refuse("the body is cut off or damaged")
        except TimeoutError:
            return _refuse(f"the body did not arrive within {_ARRIVAL_SECONDS:g} seconds")
        match = await self._index.match([bytes.fromhex(name) for name in query.blocks], None)
        return web.json_response(
            {
                "hit_tokens": match.hit_tokens,
                "latent_tokens": match.latent_tokens,
                "known_blocks": match.known_blocks,
                "reason": match.reason,
            }
        )

    async def _link_list(self, _: web.Request) -> web.Response:
        """GET /v1/links: how fast the links are."""
        links = await self._links.read_all()
        return web.json_response({name: _describe(link) for name, link in links.items()})


def _describe(link: LinkEstimate) -> dict[str, float | None]:
    return {
        "bandwidth": link.bandwidth,
        "round_trip": link.round_trip,
        "total_bytes": link.total_bytes,
        "samples": link.samples,
        "updated": link.updated,
    }


def _refuse(reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=400)


def _answering_outages(handler: Handler) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except PASSING_ERRORS:
            return web.json_response({"error": "redis does not answer"}, status=503)

    return answer
