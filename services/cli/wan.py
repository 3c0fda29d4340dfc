"""`prfaas wan`: a link to test on, between a client and a server that would be in two regions."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from services.cli.console import say
from services.cli.errors import CommandError
from services.cli.interruption import run_until_signal
from services.cli.link.control import control_application
from services.cli.link.schedule import LinkSettings
from services.cli.link.wan_link import Target, WanLink
from shared.observability.health import listening
from shared.observability.logging import configure_logging
from shared.process import new_identity
from shared.settings import WanSettings, load_settings, split_address


def run(arguments: list[str]) -> int:
    """Run the link until a signal comes; gives the exit status."""
    settings = load_settings(WanSettings, "prfaas wan", arguments)
    configure_logging(settings, "wan", new_identity("wan"))
    run_until_signal(_run_link(settings))
    return 0


async def _run_link(settings: WanSettings) -> None:
    host, port = split_address(settings.listen)
    shape = LinkSettings(
        settings.bandwidth, settings.round_trip, settings.jitter, settings.corruption
    )
    link = WanLink(_target(settings.target), shape, host=host, port=port, seed=settings.seed)
    async with AsyncExitStack() as running:
        try:
            await running.enter_async_context(link)
            if settings.control is not None:
                control = listening(control_application(link), *split_address(settings.control))
                say(f"control: {await running.enter_async_context(control)}")
        except OSError as error:
            raise CommandError(f"cannot listen: {error.strerror}") from None
        say(f"link: {host}:{link.port} -> {settings.target}")
        await asyncio.Event().wait()


def _target(written: str) -> Target:
    return Path(written) if written.startswith("/") else split_address(written)
