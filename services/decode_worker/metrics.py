"""What a decode worker counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class DecodeMetrics:
    """Prometheus metrics of one decode worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens = Counter("prfaas_decode_tokens", "Tokens generated", registry=registry)
        self.batch_size = Gauge(
            "prfaas_decode_batch_size", "Requests in the latest decode step", registry=registry
        )
        self.step_seconds = Histogram(
            "prfaas_decode_step_seconds",
            "Time of one decode step of the whole batch",
            registry=registry,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
        )
        self.transfer_seconds = Histogram(
            "prfaas_transfer_seconds",
            "From the end of prefill to the restored state",
            registry=registry,
            buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
        )
        self.pulled_bytes = Counter(
            "prfaas_pulled_bytes",
            "Bytes of restored state, as pulled and raw",
            ["form"],
            registry=registry,
        )
        self.recomputes = Counter(
            "prfaas_state_recomputes",
            "States that were lost or refused and computed again, by cause",
            ["cause"],
            registry=registry,
        )
        self.local_tokens = Counter(
            "prfaas_local_latents_tokens",
            "Prompt tokens whose latents were in this region already",
            registry=registry,
        )
        self.conversations = Counter(
            "prfaas_conversations",
            "Finished answers by what became of their state",
            ["outcome"],
            registry=registry,
        )
