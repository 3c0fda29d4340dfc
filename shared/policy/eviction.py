"""Which nodes and snapshots of a prefix cache to give up for room; it knows no store.

An entry is worth the tokens of prefill that it spares the next request, for each byte it takes and
each second since it was used. The least worth goes first, from the leaves to the root.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class CachedNode:
    """A node of the prefix cache, as far as its worth goes."""

    name: bytes
    parent: bytes
    """Name of the node it begins at the end of, or of the root, which is no node."""
    start: int
    """First token."""
    stop: int
    latent_bytes: int
    snapshot_bytes: int
    """0 for a node without a snapshot."""
    last_use: int
    """Time in ms."""
    snapshot_last_use: int
    """Time in ms at which a request continued from the snapshot; 0 for a node without one."""
    pinned: bool
    children: int
    """Nodes that begin where it ends, be they known to the reader or not."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """One entry to give up: a snapshot alone, or a node with all it has."""

    name: bytes
    snapshot_only: bool
    freed_bytes: int


def worth(spared_tokens: int, taken_bytes: int, age: float) -> float:
    """Rate an entry: the higher, the longer it is kept.

    Args:
        spared_tokens: tokens of prefill that it spares the next request, at least 0.
        taken_bytes: that would be free without it, at least 1.
        age: seconds since it was used.
    """
    return spared_tokens / (taken_bytes * (1 + max(0.0, age)))


def choose_evictions(
    nodes: Iterable[CachedNode], bytes_to_free: int, now: int
) -> tuple[Eviction, ...]:
    """Choose what to give up, in the order in which it has to be done.

    Never a node that is pinned or has children that stay.

    Args:
        nodes: those of one cache.
        bytes_to_free: what is wanted; if there is less to be had, everything is chosen.
        now: time in ms.
    """
    forest = _Forest(nodes, now)
    waiting = [candidate for name in forest.nodes for candidate in forest.candidates(name)]
    heapq.heapify(waiting)
    evictions: list[Eviction] = []
    while waiting and bytes_to_free > 0:
        candidate = heapq.heappop(waiting)
        if candidate.name not in forest.nodes:
            continue
        current = forest.rate(candidate.name)
        if current.worth > candidate.worth:  # a snapshot that it could fall back to has gone
            heapq.heappush(waiting, current)
            continue
        eviction = forest.evict(candidate.name)
        evictions.append(eviction)
        bytes_to_free -= eviction.freed_bytes
        for following in forest.made_possible_by(eviction):
            heapq.heappush(waiting, following)
    return tuple(evictions)


class _Candidate(NamedTuple):
    """Orders what may be given up: by worth, and among equals the oldest and largest first."""

    worth: float
    last_use: int
    negative_bytes: int
    name: bytes


class _Forest:
    """The nodes that are left, and which of them still have their snapshot.

    A leaf can be given up whole; of an inner node only the snapshot can.
    """

    def __init__(self, nodes: Iterable[CachedNode], now: int) -> None:
        self.nodes = {node.name: node for node in sorted(nodes, key=lambda node: node.name)}
        self._now = now
        self._parents = {name: node.parent for name, node in self.nodes.items()}
        listed = Counter(node.parent for node in self.nodes.values())
        self._children = {
            name: max(node.children, listed[name]) for name, node in self.nodes.items()
        }
        self._snapshots = {name for name, node in self.nodes.items() if node.snapshot_bytes}

    def candidates(self, name: bytes) -> Sequence[_Candidate]:
        """What of a node may be given up now: one candidate, or none."""
        if self.nodes[name].pinned or (self._children[name] and name not in self._snapshots):
            return ()
        return (self.rate(name),)

    def rate(self, name: bytes) -> _Candidate:
        """Rate what of a node may be given up now."""
        node = self.nodes[name]
        is_leaf = not self._children[name]
        spared = node.stop - self._fallback(node) if name in self._snapshots else 0
        taken = self._run_bytes(name) if is_leaf and spared else self._own_bytes(name)
        last_use = node.last_use if is_leaf else node.snapshot_last_use
        age = (self._now - last_use) / 1000
        return _Candidate(worth(spared, max(1, taken), age), last_use, -taken, name)

    def evict(self, name: bytes) -> Eviction:
        """Take a leaf, or the snapshot of an inner node, away."""
        freed = self._own_bytes(name)
        snapshot_only = bool(self._children[name])
        self._snapshots.discard(name)
        if not snapshot_only:
            node = self.nodes.pop(name)
            if node.parent in self.nodes:
                self._children[node.parent] -= 1
        return Eviction(name, snapshot_only, freed)

    def made_possible_by(self, eviction: Eviction) -> Sequence[_Candidate]:
        """What can be given up only now: a parent without children, with or without snapshot."""
        parent = self._parents[eviction.name]
        if eviction.snapshot_only or parent not in self.nodes or self._children[parent]:
            return ()
        return self.candidates(parent)

    def _own_bytes(self, name: bytes) -> int:
        node = self.nodes[name]
        snapshot = node.snapshot_bytes if name in self._snapshots else 0
        return snapshot if self._children[name] else snapshot + node.latent_bytes

    def _run_bytes(self, leaf: bytes) -> int:
        """Bytes of a leaf and of the nodes above it that are there for its sake alone."""
        taken = self._own_bytes(leaf)
        above = self.nodes.get(self.nodes[leaf].parent)
        while above and self._children[above.name] == 1 and not above.pinned:
            if above.name in self._snapshots:
                break
            taken += above.latent_bytes
            above = self.nodes.get(above.parent)
        return taken

    def _fallback(self, node: CachedNode) -> int:
        """Tokens of the nearest state above, which a request would continue from instead."""
        above = self.nodes.get(node.parent)
        while above:
            if above.name in self._snapshots:
                return above.stop
            above = self.nodes.get(above.parent)
        return 0
