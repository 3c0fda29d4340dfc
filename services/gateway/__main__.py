"""Run the gateway: `python -m services.gateway --help`."""

from services.gateway.application import serve
from shared.process import run_service
from shared.settings import GatewaySettings

if __name__ == "__main__":
    run_service("python -m services.gateway", GatewaySettings, serve)
