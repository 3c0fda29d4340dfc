"""What the gateway says of itself and of the workers behind it."""

import asyncio
import subprocess
import sys

import pytest
from redis.asyncio import Redis

from shared.streams.job_queue import JobQueue
from tests.gateway.conftest import MAX_LENGTH, StartGateway
from tests.gateway.decode_peer import DecodePeer, registration
from tests.gateway.running_gateway import RunningGateway
from tests.polling import eventually


async def reason(gateway: RunningGateway) -> str:
    status, answer = await gateway.get("/ready")
    assert status == 503, answer
    return str(answer["reason"])


async def becomes_ready(gateway: RunningGateway) -> None:
    async def is_ready() -> bool:
        return (await gateway.get("/ready"))[0] == 200

    await eventually(is_ready, within=2)


@pytest.mark.asyncio
async def test_it_is_ready_when_each_queue_has_a_live_worker(
    start: StartGateway, redis: Redis
) -> None:
    prefill = JobQueue(redis, "prefill", "prefill-1")
    decode = JobQueue(redis, "decode", "decode-1")
    async with start() as gateway:
        assert await reason(gateway) == "no prefill worker is alive"
        await prefill.register(registration("prefill", "prefill-1"), ttl_seconds=60)

        async def only_decode_is_missing() -> bool:
            return await reason(gateway) == "no decode worker is alive"

        await eventually(only_decode_is_missing, within=2)
        await decode.register(registration("decode", "decode-1"), ttl_seconds=60)
        await becomes_ready(gateway)
        await prefill.deregister()

        async def prefill_is_missing() -> bool:
            return (await gateway.get("/ready"))[0] == 503

        await eventually(prefill_is_missing, within=2)


@pytest.mark.asyncio
@pytest.mark.parametrize("field", ["fingerprint", "layout"])
async def test_workers_that_differ_are_named(
    start: StartGateway, decoder: DecodePeer, redis: Redis, field: str
) -> None:
    other = registration("prefill", "prefill-1", **{field: "other"})
    await JobQueue(redis, "prefill", "prefill-1").register(other, ttl_seconds=60)
    async with start() as gateway:
        why = await reason(gateway)
    assert all(name in why for name in (field, "prefill-1", "decode-1", "other"))


@pytest.mark.asyncio
async def test_looking_often_does_not_hammer_redis(start: StartGateway, redis: Redis) -> None:
    async with start() as gateway:
        await reason(gateway)
        before = (await redis.info("commandstats"))["cmdstat_xinfo|consumers"]["calls"]
        for _ in range(20):
            await reason(gateway)
        after = (await redis.info("commandstats"))["cmdstat_xinfo|consumers"]["calls"]
    assert after - before < 10


@pytest.mark.asyncio
async def test_the_model_is_listed(start: StartGateway) -> None:
    async with start(served_model_name="kimi") as gateway:
        status, answer = await gateway.get("/v1/models")
    created = answer["data"][0].pop("created")
    assert (status, isinstance(created, int)) == (200, True)
    assert answer == {
        "object": "list",
        "data": [
            {"id": "kimi", "object": "model", "owned_by": "prfaas", "max_model_len": MAX_LENGTH}
        ],
    }


@pytest.mark.asyncio
async def test_metrics_count_what_clients_saw(start: StartGateway, decoder: DecodePeer) -> None:
    async with start() as gateway, asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(gateway.complete())
        attempt = await decoder.take()
        await decoder.emit(attempt, 0, "abc", "length")
        await answer
        await gateway.complete(n=2)
        tasks.create_task(gateway.complete()).add_done_callback(lambda _: None)
        await decoder.take()
        expected = [
            'prfaas_requests_total{outcome="length"} 1.0',
            'prfaas_requests_total{outcome="invalid_request_error"} 1.0',
            "prfaas_requests_in_flight 1.0",
            "prfaas_ttft_seconds_count 1.0",
            "prfaas_tpot_seconds_count 1.0",
            "prfaas_prompt_tokens_total 10.0",
            "prfaas_generated_tokens_total 3.0",
            'prfaas_backlog{queue="prefill"}',
            'prfaas_backlog{queue="decode"}',
        ]
        metrics = (await gateway.metrics()).splitlines()
        assert [
            line for line in expected if not any(found.startswith(line) for found in metrics)
        ] == []
        gateway.stop.set()


def test_the_gateway_needs_no_torch() -> None:
    program = "import services.gateway.__main__, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
