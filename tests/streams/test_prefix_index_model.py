"""Whatever happens in whatever order, the prefix index is what a few lines of Python say it is."""

import asyncio
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from shared.policy.eviction import choose_evictions
from shared.streams import keys
from shared.streams.connection import connect
from shared.streams.prefix_index import CacheAccount, PrefixIndex
from shared.streams.state_store import StateStore
from tests.streams.cached_prompts import LATENT_BYTES, SNAPSHOT_BYTES, Request, name, names

CAPACITY = 2500
PROMPTS = st.text(alphabet="ab", min_size=1, max_size=4)
CUTS = st.integers(0, 3)
REQUESTS = st.sampled_from(["r1", "r2"])


@dataclass
class Model:
    """Nodes by the prompt they end; a prompt stands for all its prefixes."""

    starts: dict[str, int] = field(default_factory=dict)
    snapshots: set[str] = field(default_factory=set)
    pins: dict[str, set[str]] = field(default_factory=lambda: {"r1": set(), "r2": set()})
    open: bool = True

    @property
    def bytes(self) -> int:
        blocks = sum(len(prompt) - start for prompt, start in self.starts.items())
        return blocks * LATENT_BYTES + len(self.snapshots) * SNAPSHOT_BYTES

    def full(self, more: int) -> bool:
        return self.bytes + more > CAPACITY * 9 / 8

    def children(self, prompt: str) -> list[str]:
        return [
            child
            for child, start in self.starts.items()
            if start == len(prompt) and child.startswith(prompt)
        ]

    def chain(self, prompt: str) -> list[str]:
        """Nodes from the root to the one at the prompt's end."""
        start = self.starts[prompt]
        return [*(self.chain(prompt[:start]) if start else []), prompt]

    def longest(self, prompt: str, candidates: set[str]) -> list[str]:
        ends = [prompt[:stop] for stop in range(1, len(prompt) + 1) if prompt[:stop] in candidates]
        return self.chain(ends[-1]) if ends else []

    def known(self, prompt: str) -> int:
        def shared(node: str) -> int:
            same = [mine == theirs for mine, theirs in zip(prompt, node, strict=False)]
            length = [*same, False].index(False)
            return length if length > self.starts[node] else 0

        return max((shared(node) for node in self.starts), default=0)

    def pinned(self, prompt: str) -> bool:
        return any(prompt in pins for pins in self.pins.values())

    def remove(self, prompt: str) -> None:
        for child in self.children(prompt):
            self.remove(child)
        del self.starts[prompt]
        self.snapshots.discard(prompt)
        for pins in self.pins.values():
            pins.discard(prompt)


class PrefixIndexMachine(RuleBasedStateMachine):
    """Plays against Redis and the model at once."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = connect(self.url)
        self.index = PrefixIndex(self.redis)
        self.model = Model()
        self.requests: dict[str, Request] = {}
        self.ended = 0
        self.runner.run(self._start())

    async def _start(self) -> None:
        await self.redis.flushdb()
        await self.index.open(CAPACITY, 600)

    async def _request(self, request: str) -> Request:
        """The request of that place; its real name is its own, for a name is never used again."""
        if request not in self.requests:
            self.requests[request] = await Request.begun(self.redis, f"{request}-{self.ended}")
        return self.requests[request]

    @rule(prompt=PROMPTS, cut=CUTS, request=REQUESTS)
    def add(self, prompt: str, cut: int, request: str) -> None:
        start = min(cut, len(prompt) - 1)

        async def add() -> str:
            return await (await self._request(request)).add(prompt, start)

        expected = "adopted"
        if not self.model.open:
            expected = "closed"
        elif prompt in self.model.starts:
            expected = "known"
        elif start and prompt[:start] not in self.model.starts:
            expected = "orphan"
        elif self.model.full((len(prompt) - start) * LATENT_BYTES):
            expected = "full"
        assert self.runner.run(add()) == expected
        if expected == "adopted":
            self.model.starts[prompt] = start
        if expected in ("adopted", "known"):
            self.model.pins[request].add(prompt)

    @rule(prompt=PROMPTS, request=REQUESTS)
    def add_snapshot(self, prompt: str, request: str) -> None:
        async def add() -> str:
            return await (await self._request(request)).add_snapshot(prompt)

        expected = "adopted"
        if not self.model.open:
            expected = "closed"
        elif prompt not in self.model.starts:
            expected = "orphan"
        elif prompt in self.model.snapshots:
            expected = "known"
        elif self.model.full(SNAPSHOT_BYTES):
            expected = "full"
        assert self.runner.run(add()) == expected
        if expected == "adopted":
            self.model.snapshots.add(prompt)
            self.model.pins[request].add(prompt)

    @rule(prompt=PROMPTS, request=REQUESTS)
    def match(self, prompt: str, request: str) -> None:
        async def match() -> None:
            request_id = (await self._request(request)).request_id
            found = await self.index.match(names(prompt), request_id)
            hit = self.model.longest(prompt, self.model.snapshots)
            latents = self.model.longest(prompt, set(self.model.starts))
            assert [node.name for node in found.hit] == [name(node) for node in hit]
            assert [node.name for node in found.latents] == [name(node) for node in latents]
            assert found.known_blocks == self.model.known(prompt)
            self.model.pins[request] |= {*hit, *latents}

        self.runner.run(match())

    @rule(prompt=PROMPTS)
    def evict(self, prompt: str) -> None:
        possible = (
            prompt in self.model.starts
            and not self.model.children(prompt)
            and not self.model.pinned(prompt)
        )
        assert self.runner.run(self.index.evict(name(prompt))) == possible
        if possible:
            self.model.remove(prompt)

    @rule(prompt=PROMPTS)
    def evict_snapshot(self, prompt: str) -> None:
        possible = prompt in self.model.snapshots and not self.model.pinned(prompt)
        assert self.runner.run(self.index.evict_snapshot(name(prompt))) == possible
        if possible:
            self.model.snapshots.discard(prompt)

    @rule(prompt=PROMPTS)
    def forget(self, prompt: str) -> None:
        self.runner.run(self.index.forget([name(prompt)]))
        if prompt in self.model.starts:
            self.model.remove(prompt)

    @rule(bytes_to_free=st.integers(1, 2000))
    def evict_by_policy(self, bytes_to_free: int) -> None:
        async def evict() -> None:
            nodes = [node async for node in self.index.nodes()]
            for eviction in choose_evictions(nodes, bytes_to_free, 2**42):
                before = (await self.index.account()).bytes
                if eviction.snapshot_only:
                    assert await self.index.evict_snapshot(eviction.name)
                else:
                    assert await self.index.evict(eviction.name) == 1
                assert before - (await self.index.account()).bytes == eviction.freed_bytes
                prompt = next(each for each in self.model.starts if name(each) == eviction.name)
                assert not self.model.pinned(prompt)
                self.model.snapshots.discard(prompt)
                if not eviction.snapshot_only:
                    self.model.remove(prompt)

        self.runner.run(evict())

    @rule(request=REQUESTS, how=st.sampled_from(["release", "lease", "expire"]))
    def end(self, request: str, how: str) -> None:
        async def end() -> None:
            ending = await self._request(request)
            self.ended += 1
            del self.requests[request]
            if how == "release":
                await ending.release()
                return
            await ending.lose_lease()
            if how == "expire":
                assert ending.request_id in await StateStore(self.redis, "prefill").expire(100)

        self.runner.run(end())
        self.model.pins[request] = set()

    @rule(prompt=PROMPTS)
    def lose_latents(self, prompt: str) -> None:
        if prompt not in self.model.starts:
            return

        async def lose() -> None:
            found = await self.index.match(names(prompt), None)
            await self.redis.delete(found.latents[-1].latents.key)
            assert (await self.index.verify(0))[0] == 0

        self.runner.run(lose())
        self.model.remove(prompt)

    @rule()
    def lose_index(self) -> None:
        async def lose() -> None:
            await self.redis.delete(keys.PREFIX_INDEX)

        self.runner.run(lose())
        self.model = Model(open=self.model.open)

    @rule(is_open=st.booleans())
    def open_or_close(self, is_open: bool) -> None:
        self.runner.run(self.index.open(CAPACITY, 600) if is_open else self.index.close())
        self.model.open = is_open

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        async def check() -> None:
            assert await self.index.account() == CacheAccount(
                len(self.model.starts),
                len(self.model.snapshots),
                self.model.bytes,
                CAPACITY if self.model.open else None,
            )
            found = {node.name: node async for node in self.index.nodes()}
            assert set(found) == {name(prompt) for prompt in self.model.starts}
            for prompt in self.model.starts:
                node = found[name(prompt)]
                assert node.children == len(self.model.children(prompt))
                assert bool(node.snapshot_bytes) == (prompt in self.model.snapshots)
                assert node.pinned == self.model.pinned(prompt)

        self.runner.run(check())

    def teardown(self) -> None:
        self.runner.run(self.redis.aclose())
        self.runner.close()


def test_the_index_is_what_the_model_says(embedded_url: str) -> None:
    class Machine(PrefixIndexMachine):
        url = embedded_url

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
