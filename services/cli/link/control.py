"""The endpoints that show and change a running link."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from pydantic import TypeAdapter, ValidationError

from services.cli.link.schedule import LinkSettings
from services.cli.link.wan_link import WanLink
from shared.errors import InvalidRequestError
from shared.observability.health import add_health_routes

_MOST_BODY_BYTES: Final = 2**14
_ARRIVAL_SECONDS: Final = 10.0
_SETTINGS: Final = TypeAdapter(LinkSettings)


def control_application(link: WanLink) -> web.Application:
    """Give the application that shows and changes a link."""
    control = LinkControl(link)
    application = web.Application(client_max_size=_MOST_BODY_BYTES)
    application.router.add_get("/v1/link", control.answer)
    application.router.add_patch("/v1/link", control.change)
    for name, action in (("stall", link.stall), ("resume", link.resume), ("reset", link.reset)):
        application.router.add_post(f"/v1/link/{name}", control.doing(action))
    add_health_routes(application, _always_ready, _metrics(link))
    return application


class LinkControl:
    """Answers for a link."""

    def __init__(self, link: WanLink) -> None:
        self._link = link

    async def answer(self, _: web.Request) -> web.Response:
        """GET /v1/link: its settings and counters."""
        return self._state()

    async def change(self, request: web.Request) -> web.Response:
        """PATCH /v1/link: settings to replace, for bytes that are not on their way yet."""
        try:
            body = await _body_of(request)
            self._link.settings = changed(self._link.settings, body)
        except InvalidRequestError as error:
            refusal = {"error": str(error), "field": error.param}
            return web.json_response(refusal, status=error.http_status)
        return self._state()

    def doing(self, action: Callable[[], None]) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Give a handler that does something to the link."""

        async def do(_: web.Request) -> web.Response:
            action()
            return self._state()

        return do

    def _state(self) -> web.Response:
        link = self._link
        return web.json_response(
            {
                "settings": asdict(link.settings),
                "counters": asdict(link.counters),
                "stalled": link.is_stalled,
            }
        )


def changed(settings: LinkSettings, body: bytes) -> LinkSettings:
    """Replace the settings that a JSON object names.

    Raises:
        InvalidRequestError: the body is no such object; `param` names a wrong field.
    """
    try:
        change = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequestError("the body is not JSON") from None
    if not isinstance(change, dict):
        raise InvalidRequestError("the body has to be a JSON object")
    try:
        return _SETTINGS.validate_python(asdict(settings) | change)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        raise InvalidRequestError(f"{field}: {first['msg']}", param=field) from None


async def _body_of(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_ARRIVAL_SECONDS):
            return await request.read()
    except TimeoutError:
        raise InvalidRequestError("the body does not arrive") from None


async def _always_ready() -> str | None:
    return None


def _metrics(link: WanLink) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_LinkMetrics(link))
    return registry


class _LinkMetrics(Collector):
    """The link's counters for Prometheus."""

    def __init__(self, link: WanLink) -> None:
        self._link = link

    def collect(self) -> Iterator[Metric]:
        """Read the counters."""
        counters = self._link.counters
        carried = CounterMetricFamily("prfaas_wan_bytes", "Bytes delivered", labels=["to"])
        carried.add_metric(["target"], counters.bytes_to_target)
        carried.add_metric(["client"], counters.bytes_to_client)
        yield carried
        yield GaugeMetricFamily("prfaas_wan_held_bytes", "Bytes inside", counters.held_bytes)
        yield GaugeMetricFamily(
            "prfaas_wan_connections", "Open connections", counters.open_connections
        )
