"""Prompts in which a letter stands for a block, and requests that publish them in real segments."""

from dataclasses import dataclass, field
from hashlib import blake2b

from redis.asyncio import Redis

from shared.messages import PrefixNode, SegmentDescriptor
from shared.state_blob.prefix_hash import BLOCK_TOKENS, PrefixNames, root
from shared.streams import keys
from shared.streams.job_queue import Attempt
from shared.streams.prefix_index import Adoption, PrefixIndex
from shared.streams.state_store import StateStore
from tests.streams.conftest import begin_next, live_worker, make_job

ROOT = root("model")
LATENT_BYTES = 100
"""Of one block."""
SNAPSHOT_BYTES = 1000


def names(prompt: str) -> list[bytes]:
    """Names of a prompt's blocks, shortest first."""
    tokens = [ord(letter) for letter in prompt for _ in range(BLOCK_TOKENS)]
    return list(PrefixNames(ROOT, tokens).blocks)


def name(prompt: str) -> bytes:
    return [ROOT, *names(prompt)][-1]


@dataclass
class Request:
    """A prefill that publishes segments; it holds a lease until it is released."""

    redis: Redis
    request_id: str
    attempt: Attempt
    numbers: list[int] = field(default_factory=list)

    @classmethod
    async def begun(cls, redis: Redis, request_id: str = "r1") -> "Request":
        worker = await live_worker(redis, "w1", "prefill")
        await worker.enqueue(make_job(request_id), 1000)
        attempt = await begin_next(worker)
        await StateStore(redis, "prefill").open_lease(request_id, 60)
        return cls(redis, request_id, attempt)

    async def latents(self, prompt: str, start: int = 0) -> PrefixNode:
        """Publish the latents of a prompt's blocks from `start` on."""
        segment = await self._publish("mla", start, len(prompt), LATENT_BYTES * len(prompt[start:]))
        return PrefixNode(
            parent=name(prompt[:start]), blocks=tuple(names(prompt)[start:]), latents=segment
        )

    async def pieces(self, prompt: str, number: int = 2) -> list[SegmentDescriptor]:
        """Publish a snapshot of a prompt in equal pieces."""
        length, size = len(prompt), SNAPSHOT_BYTES // number
        return [await self._publish("kda", length, length, size) for _ in range(number)]

    async def add(self, prompt: str, start: int = 0) -> Adoption:
        """Publish latents and offer them to the cache."""
        node = await self.latents(prompt, start)
        return await PrefixIndex(self.redis).add(node, self.request_id)

    async def add_snapshot(self, prompt: str) -> Adoption:
        """Publish a snapshot and offer it to the cache."""
        pieces = await self.pieces(prompt)
        return await PrefixIndex(self.redis).add_snapshot(name(prompt), pieces, self.request_id)

    async def release(self) -> None:
        """End: everything that is still the request's own is deleted."""
        await StateStore(self.redis, "prefill").release(self.request_id)

    async def lose_lease(self) -> None:
        """Let the lease run out without anybody noticing."""
        await self.redis.zadd(keys.STATE_LEASES, {self.request_id: 1})

    async def _publish(self, kind: str, start: int, stop: int, size: int) -> SegmentDescriptor:
        key = keys.segment(self.request_id, self.attempt.epoch, len(self.numbers))
        self.numbers.append(len(self.numbers))
        data = blake2b(key.encode()).digest()[:1] * size
        segment = SegmentDescriptor.model_validate(
            {
                "key": key,
                "kind": kind,
                "producer": self.request_id,
                "epoch": self.attempt.epoch,
                "layers": 1,
                "codec": "raw",
                "start": start * BLOCK_TOKENS,
                "stop": stop * BLOCK_TOKENS,
                "wire_bytes": size,
                "raw_bytes": size,
                "checksum": bytes(16),
            }
        )
        store = StateStore(self.redis, "prefill")
        await store.write(self.request_id, segment, data)
        return segment


async def fill(redis: Redis, request_id: str, prompt: str, *cuts: int) -> None:
    """Cache a prompt by a request that has ended: nodes end at the cuts, a snapshot is last."""
    request = await Request.begun(redis, request_id)
    start = 0
    for stop in (*cuts, len(prompt)):
        assert await request.add(prompt[:stop], start) in ("adopted", "known")
        start = stop
    assert await request.add_snapshot(prompt) == "adopted"
    await request.release()
