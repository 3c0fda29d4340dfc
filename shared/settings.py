"""Every setting of every service, in one typed place.

A flag wins over a `PRFAAS_*` variable, and that over the default.
"""

import os
import sys
from hashlib import pbkdf2_hmac
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio.connection import parse_url

from shared.cache_directory import user_cache_directory
from shared.kernels.dtypes import WeightDTypeChoice
from shared.messages import Identifier
from shared.quantities import Bandwidth, Delay, Probability

ENV_PREFIX = "PRFAAS_"

_KEY_ITERATIONS: Final = 200_000

Seconds = Annotated[float, Field(gt=0)]


def _check_redis_url(url: str) -> str:
    try:
        parse_url(url)
    except ValueError:
        raise ValueError("is not a redis://, rediss:// or unix:// URL") from None
    return url


RedisUrl = Annotated[str, AfterValidator(_check_redis_url)]
Port = Annotated[int, Field(ge=0, lt=65536)]


def split_address(address: str) -> tuple[str, int]:
    """Take host and port from `HOST:PORT` or `[IPV6]:PORT`.

    Raises:
        ValueError: it is neither.
    """
    complaint = "is not HOST:PORT"
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(complaint) from None
    if not host or port is None or parts.netloc != address or parts.username is not None:
        raise ValueError(complaint)
    return host, port


def _check_address(address: str) -> str:
    split_address(address)
    return address


def _check_target(target: str) -> str:
    return target if target.startswith("/") else _check_address(target)


Address = Annotated[str, AfterValidator(_check_address)]
Target = Annotated[str, AfterValidator(_check_target)]


class Settings(BaseSettings):
    """What every process can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    log_format: Literal["console", "json"] = Field("console", description="how to write logs")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is logged"
    )


class ServiceSettings(Settings):
    """What every service can be told."""

    redis_url: RedisUrl = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,
        description="Redis or Valkey of this service's own region",
    )


class GatewaySettings(ServiceSettings):
    """The HTTP front of a serving region."""

    prefill_redis_url: RedisUrl | None = Field(
        None, repr=False, description="Redis of the prefill region; its own region's if unset"
    )
    model: Path = Field(description="checkpoint directory: configuration and tokenizer are read")
    served_model_name: str | None = Field(
        None, description="name of the model in the API; the directory's name if unset"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Port = Field(8000, description="port to listen on; 0 takes a free one")
    max_backlog: int = Field(
        256, ge=1, description="jobs queued or running before requests are answered 429"
    )
    share_prefixes: bool = Field(
        False, description="whether requests of unlike API keys share cached states"
    )
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="largest request body in bytes")
    request_timeout: Seconds = Field(
        600, le=3600, description="seconds a request may take in all, waiting included"
    )
    ping_interval: Seconds = Field(
        10, description="seconds of silence after which a stream is sent a comment"
    )
    drain_timeout: Seconds = Field(30, description="seconds that requests may go on at shutdown")


class EngineSettings(Settings):
    """How a model is computed."""

    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="what computes; the kernels for cuda have not run on a GPU yet"
    )
    dtype: WeightDTypeChoice = Field(
        "float32",
        description="dtype of the weights; auto takes bfloat16 on a GPU and where the processor "
        "has matrix units for it, float32 elsewhere",
    )
    state_tokens: int = Field(
        0,
        ge=0,
        description="tokens that the states of all requests have room for; 0 takes the model's "
        "context, or 8192 a request if that is more",
    )


class WorkerSettings(ServiceSettings, EngineSettings):
    """What prefill and decode workers have in common."""

    model: Path = Field(description="checkpoint directory")
    threads: int = Field(
        0, ge=0, description="threads of one computation; 0 takes one for each processor"
    )
    max_attempts: int = Field(
        3, ge=1, description="deliveries of a job after which it is quarantined"
    )
    heartbeat_interval: Seconds = Field(1, description="seconds between signs of life")
    heartbeat_ttl: Seconds = Field(
        8, description="seconds without a sign of life after which a worker's jobs are taken over"
    )
    drain_timeout: Seconds = Field(30, description="seconds that jobs may go on at shutdown")
    health_host: str = Field("127.0.0.1", description="address of the health and metrics endpoints")
    health_port: Port = Field(0, description="port of those endpoints; 0 takes a free one")
    cache: Path | None = Field(
        default_factory=user_cache_directory,
        description="directory that remembers fingerprints of checkpoints, if it can be written",
    )
    latent_codec: Literal["auto", "raw", "zstd", "int8-latent"] = Field(
        "auto",
        description="coding of MLA latents; auto takes raw or zstd, whichever the slowest link "
        "carries faster",
    )
    state_codec: Literal["auto", "raw", "zstd", "bf16-state"] = Field(
        "auto", description="coding of KDA states; auto as for latents"
    )
    state_key: SecretStr | None = Field(
        None,
        min_length=16,
        description="secret that states are signed with; then nothing unsigned is read",
    )
    prefix_cache: bool = Field(
        True, description="whether states are kept for, and taken from, prompts that begin alike"
    )

    @property
    def signing(self) -> str:
        """Names the key that states are signed with; it takes a while to try keys out."""
        if self.signing_key is None:
            return "no key"
        digest = pbkdf2_hmac("sha256", self.signing_key, b"prfaas state key", _KEY_ITERATIONS)
        return f"key {digest[:8].hex()}"

    @property
    def signing_key(self) -> bytes | None:
        """What states are signed with, if they are."""
        return self.state_key.get_secret_value().encode() if self.state_key else None


class PrefillWorkerSettings(WorkerSettings):
    """A worker that computes states in the prefill region."""

    chunk_tokens: int = Field(
        512,
        ge=64,
        le=65536,
        multiple_of=64,
        description="tokens prefilled and published at a time, in whole blocks of 64",
    )
    state_lease: Seconds = Field(
        300, description="seconds a state is kept for while no decode worker holds it"
    )


class DecodeWorkerSettings(WorkerSettings):
    """A worker that generates tokens in the serving region."""

    prefill_redis_url: RedisUrl | None = Field(
        None, repr=False, description="Redis of the prefill region; its own region's if unset"
    )
    state_redis_url: RedisUrl | None = Field(
        None,
        repr=False,
        description="Redis that keeps this region's copies of states; that of its jobs if unset",
    )
    link: Identifier = Field(
        "serving", description="name of the network between the prefill region and this one"
    )
    pull_connections: int = Field(
        4, ge=1, le=64, description="connections that states are pulled over"
    )
    slots: int = Field(16, ge=1, le=1024, description="requests decoded in one batch")
    waiting: int = Field(
        32, ge=0, le=4096, description="further requests held while their prefill is under way"
    )
    stall_timeout: Seconds = Field(
        30, description="seconds that a prefill without a live worker, or its region, may be silent"
    )
    max_recomputes: int = Field(
        2, ge=0, description="times a lost or damaged state is computed again"
    )
    state_lease: Seconds = Field(60, description="seconds for which a state in use is kept")


class KvStoreSettings(ServiceSettings):
    """The control plane of the states kept in one region's Redis."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: Port = Field(8001, description="port to listen on; 0 takes a free one")
    sweep_interval: Seconds = Field(1, description="seconds between sweeps for expired leases")
    capacity: int = Field(
        0,
        ge=0,
        description="bytes of the prefix cache; 0 takes half of the server's maxmemory, or 1 GiB "
        "if it has none",
    )


class UpSettings(EngineSettings):
    """A whole system on one machine: both regions share one Redis."""

    redis_url: RedisUrl | None = Field(
        None, repr=False, description="Redis or Valkey to use; an embedded Valkey if unset"
    )
    model: Path | None = Field(
        None, description="checkpoint directory; the small model that ships with it if unset"
    )
    host: str = Field("127.0.0.1", description="address the gateway listens on")
    port: Port = Field(8000, description="port the gateway listens on; 0 takes a free one")
    prefill_workers: int = Field(1, ge=1, le=64, description="prefill workers to run")
    decode_workers: int = Field(1, ge=1, le=64, description="decode workers to run")
    threads: int = Field(
        0, ge=0, description="threads of each worker; 0 shares the processors among the workers"
    )
    ready_timeout: Seconds = Field(120, description="seconds the system may take to be ready")
    drain_timeout: Seconds = Field(30, description="seconds that requests may go on at shutdown")


class WanSettings(Settings):
    """A link to test on: what bandwidth and delay between two regions do, on one machine."""

    listen: Address = Field(description="HOST:PORT to listen on; port 0 takes a free one")
    target: Target = Field(
        description="HOST:PORT that connections are forwarded to, or the path of a unix socket"
    )
    bandwidth: Bandwidth = Field(
        200e6, description="bits a second in each direction, like 200M or 1.5G; 0 sets no limit"
    )
    round_trip: Delay = Field(0.04, description="time to the target and back, like 40ms")
    jitter: Delay = Field(0.0, description="time by which bytes are late at most, like 5ms")
    corruption: Probability = Field(
        0.0, description="probability that a byte is changed on its way"
    )
    seed: int = Field(0, description="makes jitter and corruption repeatable")
    control: Address | None = Field(
        None, description="HOST:PORT of the endpoints that show and change the link; none if unset"
    )


SERVICE_SETTINGS: tuple[type[Settings], ...] = (
    GatewaySettings,
    PrefillWorkerSettings,
    DecodeWorkerSettings,
    KvStoreSettings,
    UpSettings,
    WanSettings,
)

SettingsT = TypeVar("SettingsT", bound=Settings)


def load_settings(
    settings_type: type[SettingsT], program: str, arguments: list[str] | None = None
) -> SettingsT:
    """Build a service's settings from its command line, the environment and the defaults.

    A wrong, missing or unknown setting ends the process with status 2 and one line that names it.
    """
    unknown = unknown_variables(os.environ)
    if unknown:
        sys.exit(f"{program}: unknown environment variable {', '.join(unknown)}")
    options: dict[str, Any] = {
        "_cli_parse_args": sys.argv[1:] if arguments is None else arguments,
        "_cli_prog_name": program,
    }
    try:
        return settings_type(**options)
    except ValidationError as error:
        print(f"{program}: {_first_error(error)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def unknown_variables(environment: "os._Environ[str] | dict[str, str]") -> list[str]:
    """Names of `PRFAAS_*` variables that are no setting of any service."""
    known = {
        ENV_PREFIX + field.upper()
        for settings_type in SERVICE_SETTINGS
        for field in settings_type.model_fields
    }
    return sorted(
        name
        for name in environment
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known
    )


def _first_error(error: ValidationError) -> str:
    # The input is left out: it may be a URL with a password.
    first = error.errors(include_input=False, include_url=False)[0]
    name = "-".join(map(str, first["loc"])).replace("_", "-")
    return f"--{name}: {first['msg']}"
