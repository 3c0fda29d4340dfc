"""Run a region's kv_store service: `python -m services.kv_store --help`."""

from services.kv_store.application import serve
from shared.process import run_service
from shared.settings import KvStoreSettings

if __name__ == "__main__":
    run_service("python -m services.kv_store", KvStoreSettings, serve)
