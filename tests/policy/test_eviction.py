"""What is evicted: what is worth least, from the leaves on, and never what is in use."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from shared.policy.eviction import CachedNode, Eviction, choose_evictions, worth

NOW = 1_000_000
TIMES = st.integers(0, NOW)


def node(
    name: str,
    parent: str = "root",
    *,
    start: int = 0,
    stop: int = 64,
    latent_bytes: int = 100,
    snapshot_bytes: int = 1000,
    last_use: int = 0,
    snapshot_last_use: int = 0,
    pinned: bool = False,
    children: int = 0,
) -> CachedNode:
    return CachedNode(
        name=name.encode(),
        parent=parent.encode(),
        start=start,
        stop=stop,
        latent_bytes=latent_bytes,
        snapshot_bytes=snapshot_bytes,
        last_use=last_use,
        snapshot_last_use=snapshot_last_use,
        pinned=pinned,
        children=children,
    )


@st.composite
def forests(draw: st.DrawFn) -> list[CachedNode]:
    """Trees of nodes in any order."""
    count = draw(st.integers(0, 12))
    parents = [draw(st.integers(-1, number - 1)) for number in range(count)]
    stops: list[int] = []
    nodes: list[CachedNode] = []
    for number, parent in enumerate(parents):
        start = stops[parent] if parent >= 0 else 0
        stops.append(start + 64 * draw(st.integers(1, 8)))
        has_snapshot = draw(st.booleans())
        nodes.append(
            node(
                str(number),
                str(parent),
                start=start,
                stop=stops[-1],
                latent_bytes=draw(st.integers(1, 1000)),
                snapshot_bytes=draw(st.integers(1, 5000)) if has_snapshot else 0,
                last_use=draw(TIMES),
                snapshot_last_use=draw(TIMES) if has_snapshot else 0,
                pinned=draw(st.integers(0, 4)) == 0,
                children=parents.count(number),
            )
        )
    return draw(st.permutations(nodes))


def check_each_is_possible(nodes: Sequence[CachedNode], evictions: Sequence[Eviction]) -> int:
    """Carry evictions out, one after the other; gives what could have been evicted after all."""
    left = {each.name: each for each in nodes}
    snapshots = {each.name for each in nodes if each.snapshot_bytes}

    def has_children(name: bytes) -> bool:
        return any(each.parent == name for each in left.values())

    for eviction in evictions:
        evicted = left[eviction.name]
        assert not evicted.pinned
        freed = evicted.snapshot_bytes if eviction.name in snapshots else 0
        if eviction.snapshot_only:
            assert eviction.name in snapshots
        else:
            assert not has_children(eviction.name)
            freed += evicted.latent_bytes
            del left[eviction.name]
        snapshots.discard(eviction.name)
        assert eviction.freed_bytes == freed
    return sum(
        not each.pinned and (not has_children(each.name) or each.name in snapshots)
        for each in left.values()
    )


@given(nodes=forests(), bytes_to_free=st.integers(0, 20_000))
def test_enough_is_freed_or_everything_that_can_be(
    nodes: list[CachedNode], bytes_to_free: int
) -> None:
    evictions = choose_evictions(nodes, bytes_to_free, NOW)
    possible_still = check_each_is_possible(nodes, evictions)
    freed = [eviction.freed_bytes for eviction in evictions]
    assert sum(freed) >= bytes_to_free or possible_still == 0
    assert sum(freed[:-1]) < bytes_to_free or not freed


@given(nodes=forests(), bytes_to_free=st.integers(0, 20_000))
def test_the_order_in_which_nodes_are_read_does_not_matter(
    nodes: list[CachedNode], bytes_to_free: int
) -> None:
    others = sorted(nodes, key=lambda each: each.name)
    assert choose_evictions(nodes, bytes_to_free, NOW) == choose_evictions(
        others, bytes_to_free, NOW
    )


ROWS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 1000), TIMES), min_size=2, max_size=8)


def prompts(rows: list[tuple[int, int, int]]) -> list[CachedNode]:
    """Prompts that share nothing."""
    return [
        node(str(number), stop=64 * blocks, snapshot_bytes=size, last_use=used)
        for number, (blocks, size, used) in enumerate(rows)
    ]


def place(nodes: list[CachedNode], name: bytes) -> int:
    order = [eviction.name for eviction in choose_evictions(nodes, 2**40, NOW)]
    return order.index(name)


@given(rows=ROWS, older=st.integers(0, NOW))
def test_what_was_not_used_for_longer_goes_no_later(
    rows: list[tuple[int, int, int]], older: int
) -> None:
    blocks, size, used = rows[0]
    aged = [(blocks, size, max(0, used - older)), *rows[1:]]
    assert place(prompts(aged), b"0") <= place(prompts(rows), b"0")


@given(rows=ROWS, more=st.integers(0, 1000))
def test_what_takes_more_bytes_goes_no_later(rows: list[tuple[int, int, int]], more: int) -> None:
    blocks, size, used = rows[0]
    larger = [(blocks, size + more, used), *rows[1:]]
    assert place(prompts(larger), b"0") <= place(prompts(rows), b"0")


@given(rows=ROWS, more=st.integers(0, 50))
def test_what_spares_more_tokens_goes_no_earlier(
    rows: list[tuple[int, int, int]], more: int
) -> None:
    blocks, size, used = rows[0]
    longer = [(blocks + more, size, used), *rows[1:]]
    assert place(prompts(longer), b"0") >= place(prompts(rows), b"0")


@given(
    spared=st.integers(0, 2**20),
    taken=st.integers(1, 2**30),
    age=st.floats(0, 1e6),
    more=st.integers(1, 2**20),
)
def test_worth_falls_with_bytes_and_age_and_rises_with_tokens(
    spared: int, taken: int, age: float, more: int
) -> None:
    assert worth(spared, taken + more, age) <= worth(spared, taken, age)
    assert worth(spared, taken, age + more) <= worth(spared, taken, age)
    assert worth(spared + more, taken, age) > worth(spared, taken, age)


def names_of(evictions: tuple[Eviction, ...]) -> list[tuple[bytes, bool]]:
    return [(eviction.name, eviction.snapshot_only) for eviction in evictions]


def test_a_snapshot_close_below_another_goes_before_one_far_below() -> None:
    trunk = node("trunk", stop=6400, children=2, pinned=True)
    near = node("near", "trunk", start=6400, stop=6464)
    far = node("far", "trunk", start=6400, stop=9600)
    assert names_of(choose_evictions([trunk, near, far], 1, NOW)) == [(b"near", False)]


def test_an_inner_snapshot_goes_alone_and_makes_those_below_worth_more() -> None:
    inner = node("inner", stop=64, children=1, snapshot_bytes=10_000)
    leaf = node("leaf", "inner", start=64, stop=6400, snapshot_bytes=10_000)
    evictions = choose_evictions([inner, leaf], 2**40, NOW)
    assert names_of(evictions) == [(b"inner", True), (b"leaf", False), (b"inner", False)]


def test_latents_that_lead_to_no_snapshot_go_first() -> None:
    tail = node("tail", stop=64_000, snapshot_bytes=0, latent_bytes=1, last_use=NOW)
    whole = node("whole", stop=64, latent_bytes=10**6)
    assert names_of(choose_evictions([tail, whole], 1, NOW)) == [(b"tail", False)]


def test_a_chain_that_is_there_for_one_snapshot_weighs_as_a_whole() -> None:
    links = [
        node(
            str(number),
            str(number - 1),
            start=64 * number,
            stop=64 * (number + 1),
            snapshot_bytes=0,
            latent_bytes=1000,
            children=1,
        )
        for number in range(9)
    ]
    end = node("end", "8", start=576, stop=640, latent_bytes=1000, snapshot_bytes=10)
    lone = node("lone", stop=640, latent_bytes=5000, snapshot_bytes=10)
    assert names_of(choose_evictions([*links, end, lone], 1, NOW)) == [(b"end", False)]


def test_a_child_that_was_not_read_keeps_its_parent() -> None:
    assert choose_evictions([node("a", snapshot_bytes=0, children=1)], 1, NOW) == ()
