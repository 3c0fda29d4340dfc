"""The programs of a whole system on one machine, in the order in which they are started."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.cli.supervisor import Program
from services.cli.workspace import module_command
from shared.settings import ENV_PREFIX, UpSettings

LOOPBACK: Final = "127.0.0.1"

_REDIS_URL: Final = f"{ENV_PREFIX}REDIS_URL"
_OTHER_REDIS_URLS: Final = (f"{ENV_PREFIX}PREFILL_REDIS_URL", f"{ENV_PREFIX}STATE_REDIS_URL")
_STOP_MARGIN: Final = 10.0
"""Seconds a service may take beyond its own time to drain, before it is killed."""


@dataclass(frozen=True, slots=True)
class SystemPlan:
    """Programs by tier; a tier is started after, and stopped before, the one it stands on."""

    kv_store: Program
    workers: tuple[Program, ...]
    gateway: Program

    @property
    def tiers(self) -> tuple[tuple[Program, ...], ...]:
        """All programs, the first tier to start first."""
        return ((self.kv_store,), self.workers, (self.gateway,))


class SystemPlanner:
    """Turns the settings of a system into the command lines of its services.

    Args:
        settings: of the whole system.
        model: checkpoint directory.
        environment: variables of the services, but for the Redis they use.
        redis_url: of that Redis. It goes by the environment: command lines can be read by all.
    """

    def __init__(
        self, settings: UpSettings, model: Path, environment: Mapping[str, str], redis_url: str
    ) -> None:
        self._settings = settings
        self._model = model
        self._environment = _environment_with(environment, redis_url)

    @property
    def ports_needed(self) -> int:
        """Free ports that a plan takes: one for each service but the gateway."""
        return 1 + self._settings.prefill_workers + self._settings.decode_workers

    def plan(self, gateway_port: int, free_ports: Iterable[int]) -> SystemPlan:
        """Give each service its command line.

        Args:
            gateway_port: where the gateway listens.
            free_ports: for all others; as many as `ports_needed`.
        """
        ports = iter(free_ports)
        workers = (
            *_names("prefill_worker", self._settings.prefill_workers),
            *_names("decode_worker", self._settings.decode_workers),
        )
        return SystemPlan(
            kv_store=self._kv_store(next(ports)),
            workers=tuple(self._worker(module, name, next(ports)) for module, name in workers),
            gateway=self._gateway(gateway_port),
        )

    def _fair_threads(self) -> int:
        """A share of the processors for each worker.

        More threads than processors gain nothing when the machine is idle, and cost most of the
        speed as soon as anything else runs on it.
        """
        workers = self._settings.prefill_workers + self._settings.decode_workers
        return max(1, (os.cpu_count() or 1) // workers)

    def _kv_store(self, port: int) -> Program:
        flags = {"host": LOOPBACK, "port": port}
        return self._program("kv_store", "kv_store", flags, _url(LOOPBACK, port))

    def _worker(self, module: str, name: str, port: int) -> Program:
        flags = {
            "model": self._model,
            "device": self._settings.device,
            "dtype": self._settings.dtype,
            "state-tokens": self._settings.state_tokens,
            "threads": self._settings.threads or self._fair_threads(),
            "drain-timeout": self._settings.drain_timeout,
            "health-host": LOOPBACK,
            "health-port": port,
        }
        return self._program(module, name, flags, _url(LOOPBACK, port))

    def _gateway(self, port: int) -> Program:
        flags = {
            "model": self._model,
            "host": self._settings.host,
            "port": port,
            "drain-timeout": self._settings.drain_timeout,
        }
        return self._program("gateway", "gateway", flags, _url(self._settings.host, port))

    def _program(self, module: str, name: str, flags: Mapping[str, object], url: str) -> Program:
        logging = {"log-format": self._settings.log_format, "log-level": self._settings.log_level}
        arguments = (f"--{flag}={value}" for flag, value in {**flags, **logging}.items())
        return Program(
            name=name,
            command=tuple(module_command(f"services.{module}", *arguments)),
            environment=self._environment,
            url=url,
            stop_limit=self._settings.drain_timeout + _STOP_MARGIN,
        )


def _environment_with(environment: Mapping[str, str], redis_url: str) -> dict[str, str]:
    """Both regions of the system share one Redis, whatever the environment says of the other."""
    decided_here = (_REDIS_URL, *_OTHER_REDIS_URLS)
    kept = {name: value for name, value in environment.items() if name.upper() not in decided_here}
    return {**kept, _REDIS_URL: redis_url}


def _names(module: str, count: int) -> list[tuple[str, str]]:
    if count == 1:
        return [(module, module)]
    return [(module, f"{module}-{number}") for number in range(1, count + 1)]


def _url(host: str, port: int) -> str:
    """Where this machine reaches a service that listens on `host`."""
    reachable = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
