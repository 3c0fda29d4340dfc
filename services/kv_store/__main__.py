"""Run a region's kv_store service: `python -m services.kv_store --help`."""

import asyncio

from services.kv_store.application import serve
from shared.process import run_service
from shared.settings import KvStoreSettings, load_settings


def main() -> None:
    """Run until a signal comes."""
    program = "python -m services.kv_store"
    settings = load_settings(KvStoreSettings, program)

    async def run(stop: asyncio.Event) -> None:
        await serve(settings, stop)

    run_service(program, run)


if __name__ == "__main__":
    main()
