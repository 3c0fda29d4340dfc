"""Run a decode worker: `python -m services.decode_worker --help`."""

import asyncio

from services.decode_worker.worker import serve
from shared.process import run_service
from shared.settings import DecodeWorkerSettings, load_settings


def main() -> None:
    """Run until a signal comes."""
    program = "python -m services.decode_worker"
    settings = load_settings(DecodeWorkerSettings, program)

    async def run(stop: asyncio.Event) -> None:
        await serve(settings, stop)

    run_service(program, run)


if __name__ == "__main__":
    main()
