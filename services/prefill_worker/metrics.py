"""What a prefill worker counts."""

from prometheus_client import CollectorRegistry, Counter, Histogram


class PrefillMetrics:
    """Prometheus metrics of one prefill worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.prompt_tokens = Counter(
            "prfaas_prefill_tokens", "Prompt tokens prefilled", registry=registry
        )
        self.seconds = Histogram(
            "prfaas_prefill_seconds",
            "From the start of an attempt to the first token",
            registry=registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )
        self.state_bytes = Counter(
            "prfaas_published_bytes",
            "Bytes of published state, raw and as written",
            ["form"],
            registry=registry,
        )
        self.lookups = Counter(
            "prfaas_prefix_lookups",
            "Prompts by whether a cached prefix was found and used, or why not",
            ["outcome"],
            registry=registry,
        )
        self.cached_tokens = Counter(
            "prfaas_prefix_cached_tokens",
            "Prompt tokens whose state was restored from the prefix cache",
            registry=registry,
        )
