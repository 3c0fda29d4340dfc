"""What a kv_store counts itself, and what it shows of the numbers that are kept in Redis."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.policy.link_estimate import LinkEstimate
from shared.streams.prefix_index import CacheAccount, CacheCounts
from shared.streams.state_store import StateAccount


class KvStoreMetrics:
    """Prometheus metrics of one region's states and prefix cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.expired = Counter(
            "prfaas_states_expired", "States deleted for want of a lease", registry=registry
        )
        self.forgotten = Counter(
            "prfaas_cache_forgotten",
            "Nodes and snapshots of the prefix cache that Redis had lost",
            registry=registry,
        )
        self.orphans = Counter(
            "prfaas_orphan_segments", "Segments that nobody knew", registry=registry
        )
        self._states = Gauge("prfaas_states", "States under a lease", registry=registry)
        self._segments = Gauge(
            "prfaas_state_segments", "Segments of states under a lease", registry=registry
        )
        self._bytes = Gauge(
            "prfaas_state_bytes", "Bytes of states under a lease", registry=registry
        )
        self._kept = _KeptNumbers()
        registry.register(self._kept)

    def show_states(self, account: StateAccount) -> None:
        """Show what the leased states weigh."""
        self._states.set(account.states)
        self._segments.set(account.segments)
        self._bytes.set(account.segment_bytes)

    def show_cache(self, account: CacheAccount, counts: CacheCounts) -> None:
        """Show what the prefix cache holds and did."""
        self._kept.cache = (account, counts)

    def show_links(self, links: Mapping[str, LinkEstimate]) -> None:
        """Show how fast the links are."""
        self._kept.links = links


class _KeptNumbers(Collector):
    """Numbers that Redis counts: shown as they were last read, never added to here."""

    def __init__(self) -> None:
        self.cache: tuple[CacheAccount, CacheCounts] | None = None
        self.links: Mapping[str, LinkEstimate] = {}

    def collect(self) -> Iterator[Metric]:
        """Give all of them."""
        if self.cache is not None:
            yield from _cache_families(*self.cache)
        yield from _link_families(self.links)


def _cache_families(account: CacheAccount, counts: CacheCounts) -> Iterator[Metric]:
    for name, documentation, value in (
        ("prfaas_cache_nodes", "Nodes of the prefix cache", account.nodes),
        ("prfaas_cache_snapshots", "Nodes that have a snapshot", account.snapshots),
        ("prfaas_cache_bytes", "Bytes of the prefix cache", account.bytes),
        ("prfaas_cache_capacity_bytes", "0 while the cache is closed", account.capacity or 0),
    ):
        yield GaugeMetricFamily(name, documentation, value)
    yield CounterMetricFamily(
        "prfaas_cache_hits", "Prompts of which a prefix was there", counts.matches["hit"]
    )
    yield CounterMetricFamily(
        "prfaas_cache_hit_tokens", "Tokens of the prefixes that were there", counts.hit_tokens
    )
    misses = CounterMetricFamily(
        "prfaas_cache_misses", "Prompts of which no prefix was there", labels=["reason"]
    )
    for reason, number in counts.matches.items():
        if reason != "hit":
            misses.add_metric([reason], number)
    yield misses
    evictions = CounterMetricFamily(
        "prfaas_cache_evictions", "Entries given up for room", labels=["entry"]
    )
    evictions.add_metric(["node"], counts.evicted_nodes)
    evictions.add_metric(["snapshot"], counts.evicted_snapshots)
    yield evictions


def _link_families(links: Mapping[str, LinkEstimate]) -> Iterator[Metric]:
    bandwidth = GaugeMetricFamily(
        "prfaas_link_bandwidth_bytes", "Bytes a second over a link", labels=["link"]
    )
    round_trip = GaugeMetricFamily(
        "prfaas_link_round_trip_seconds", "Round trip of a link", labels=["link"]
    )
    carried = CounterMetricFamily("prfaas_link_bytes", "Bytes over a link", labels=["link"])
    for name, link in links.items():
        if link.bandwidth is not None:
            bandwidth.add_metric([name], link.bandwidth)
        if link.round_trip is not None:
            round_trip.add_metric([name], link.round_trip)
        carried.add_metric([name], link.total_bytes)
    yield from (bandwidth, round_trip, carried)
