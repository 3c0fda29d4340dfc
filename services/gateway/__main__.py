"""Run the gateway: `python -m services.gateway --help`."""

import asyncio

from services.gateway.application import serve
from shared.process import run_service
from shared.settings import GatewaySettings, load_settings


def main() -> None:
    """Run until a signal comes."""
    program = "python -m services.gateway"
    settings = load_settings(GatewaySettings, program)

    async def run(stop: asyncio.Event) -> None:
        await serve(settings, stop)

    run_service(program, run)


if __name__ == "__main__":
    main()
