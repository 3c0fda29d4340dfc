"""Run a decode worker: `python -m services.decode_worker --help`."""

from services.decode_worker.worker import serve
from shared.process import run_service
from shared.settings import DecodeWorkerSettings

if __name__ == "__main__":
    run_service("python -m services.decode_worker", DecodeWorkerSettings, serve)
