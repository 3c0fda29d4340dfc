"""`prfaas up`: a whole system on one machine, every service a process of its own."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

import models
from services.cli.console import say
from services.cli.embedded_valkey import socket_url, valkey_command, wait_for_ping
from services.cli.errors import CommandError
from services.cli.free_ports import check_port, free_ports
from services.cli.interruption import run_until_signal
from services.cli.readiness import reason_not_ready, wait_until_ready
from services.cli.supervisor import Program, Supervisor, supervision
from services.cli.system_plan import SystemPlan, SystemPlanner
from services.cli.workspace import temporary_workspace
from shared.kimi_linear.config import KimiLinearConfig
from shared.settings import UpSettings, load_settings

_REDIS_SECONDS: Final = 10.0


def run(arguments: list[str]) -> int:
    """Run the system until a signal comes; gives the exit status."""
    settings = load_settings(UpSettings, "prfaas up", arguments)
    run_until_signal(_run_system(settings))
    return 0


async def _run_system(settings: UpSettings) -> None:
    async with running_system(settings) as url:
        say(f"ready: {url}")
        await asyncio.Event().wait()


@asynccontextmanager
async def running_system(settings: UpSettings) -> AsyncIterator[str]:
    """Run a whole system while the block runs; gives the gateway's URL once it is ready.

    The block is cancelled when a service has to be given up.

    Raises:
        PrfaasError: it cannot be started like this.
        ExceptionGroup: of a CommandError for each service that did not start or stay.
    """
    check_port(settings.host, settings.port)
    with temporary_workspace() as workspace:
        model = settings.model or models.TINY
        KimiLinearConfig.from_directory(model)
        async with (
            supervision(
                group=workspace.process_group, relay_logs=settings.log_format == "console"
            ) as supervisor,
            AsyncExitStack() as running,
        ):
            redis_url = settings.redis_url
            if redis_url is None:
                valkey = _valkey_program(workspace.directory, settings)
                await running.enter_async_context(supervisor.running(valkey))
                redis_url = socket_url(workspace.directory)
            await wait_for_ping(redis_url, min(_REDIS_SECONDS, settings.ready_timeout))
            plan = _plan(settings, model, redis_url)
            for programs in plan.tiers:
                await running.enter_async_context(supervisor.running(*programs))
            await _wait_until_ready(plan, supervisor, settings.ready_timeout)
            yield plan.gateway.url


def _valkey_program(directory: Path, settings: UpSettings) -> Program:
    command = valkey_command(directory, logs_warnings=settings.log_level != "error")
    return Program("valkey", command)


def _plan(settings: UpSettings, model: Path, redis_url: str) -> SystemPlan:
    planner = SystemPlanner(settings, model, os.environ, redis_url)
    spare_port, *ports = free_ports(1 + planner.ports_needed)
    return planner.plan(settings.port or spare_port, ports)


async def _wait_until_ready(plan: SystemPlan, supervisor: Supervisor, limit: float) -> None:
    async with aiohttp.ClientSession() as session:
        try:
            async with asyncio.timeout(limit):
                await wait_until_ready(session, plan.gateway.url)
        except TimeoutError:
            complaints = await _complaints(plan, supervisor, session)
            raise CommandError(f"not ready within {limit:g} s\n{complaints}") from None


async def _complaints(
    plan: SystemPlan, supervisor: Supervisor, session: aiohttp.ClientSession
) -> str:
    """Which services are not ready, why, and what they logged last."""
    lines: list[str] = []
    for program in (program for tier in plan.tiers for program in tier):
        reason = await reason_not_ready(session, program.url)
        if reason is not None:
            lines += [f"{program.name}: {reason}", *supervisor.last_lines(program.name)]
    return "\n".join(lines)
