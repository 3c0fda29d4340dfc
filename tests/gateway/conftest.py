"""Model directories without weights, gateways, a clean Redis, and the peer behind it."""

import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from shared.settings import GatewaySettings
from shared.streams.connection import connect
from tests.gateway.decode_peer import DecodePeer, registration
from tests.gateway.running_gateway import RunningGateway, running_gateway

REFERENCE = Path(__file__).parent.parent / "reference" / "kimi_linear_small"
VOCAB_SIZE = 512
END_TOKEN = 510
MAX_LENGTH = 2048


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a byte-level tokenizer; the gateway reads no weights."""
    directory = tmp_path_factory.mktemp("models") / "text-model"
    directory.mkdir()
    config = json.loads((REFERENCE / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_max_length": MAX_LENGTH}))
    tokenizer = {"vocab_size": VOCAB_SIZE, "special_tokens": {"<end>": END_TOKEN}}
    (directory / "byte_tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="session")
def token_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "token-model"
    directory.mkdir()
    shutil.copy(REFERENCE / "config.json", directory)
    return directory


StartGateway = Callable[..., AbstractAsyncContextManager[RunningGateway]]


@pytest.fixture
def start(redis: Redis, embedded_url: str, text_model: Path) -> StartGateway:
    """Starts gateways; settings can be given by name."""
    del redis  # clean before the gateway comes

    def start_gateway(**settings: Any) -> AbstractAsyncContextManager[RunningGateway]:
        defaults: dict[str, Any] = {
            "redis_url": embedded_url,
            "model": text_model,
            "port": 0,
            "drain_timeout": 1,
        }
        return running_gateway(GatewaySettings(**(defaults | settings)))

    return start_gateway


@pytest_asyncio.fixture
async def redis(embedded_url: str) -> AsyncIterator[Redis]:
    """A clean Redis."""
    async with connect(embedded_url) as client:
        await client.flushall()
        yield client


@pytest_asyncio.fixture
async def decoder(redis: Redis) -> DecodePeer:
    """A decode worker that waits for jobs."""
    peer = DecodePeer(redis)
    await peer.queue.register(registration("decode", "decode-1"), ttl_seconds=60)
    return peer
