"""Run a prefill worker: `python -m services.prefill_worker --help`."""

import asyncio

from services.prefill_worker.worker import serve
from shared.process import run_service
from shared.settings import PrefillWorkerSettings, load_settings


def main() -> None:
    """Run until a signal comes."""
    program = "python -m services.prefill_worker"
    settings = load_settings(PrefillWorkerSettings, program)

    async def run(stop: asyncio.Event) -> None:
        await serve(settings, stop)

    run_service(program, run)


if __name__ == "__main__":
    main()
