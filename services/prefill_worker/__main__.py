"""Run a prefill worker: `python -m services.prefill_worker --help`."""

from services.prefill_worker.worker import serve
from shared.process import run_service
from shared.settings import PrefillWorkerSettings

if __name__ == "__main__":
    run_service("python -m services.prefill_worker", PrefillWorkerSettings, serve)
