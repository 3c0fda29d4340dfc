"""What the gateway counts and measures, as its clients see it: for Prometheus and for the log."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.errors import PrfaasError

log = structlog.get_logger()

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class GatewayMetrics:
    """Prometheus metrics of one gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "prfaas_requests",
            "Completion requests by what they ended with",
            ["outcome"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "prfaas_requests_in_flight", "Completion requests not answered yet", registry=registry
        )
        self.ttft = Histogram(
            "prfaas_ttft_seconds",
            "From a request's arrival to its first token",
            registry=registry,
            buckets=_TTFT_BUCKETS,
        )
        self.tpot = Histogram(
            "prfaas_tpot_seconds",
            "Time per token after the first, averaged over each request",
            registry=registry,
            buckets=_TPOT_BUCKETS,
        )
        self.prompt_tokens = Counter(
            "prfaas_prompt_tokens", "Tokens of valid prompts", registry=registry
        )
        self.generated_tokens = Counter(
            "prfaas_generated_tokens", "Tokens relayed to clients", registry=registry
        )
        self.backlog = Gauge(
            "prfaas_backlog", "Jobs queued or running", ["queue"], registry=registry
        )

    @contextmanager
    def measuring(self) -> Iterator["Measurement"]:
        """Measure one request while the block runs."""
        measurement = Measurement(self)
        with self.in_flight.track_inprogress():
            try:
                yield measurement
            except BaseException as error:
                measurement.failed(error)
                raise
            finally:
                measurement.close()


class Measurement:
    """One request, as it goes on."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._started = monotonic()
        self._first_token: float | None = None
        self._last_token = self._started
        self.outcome = "server_error"
        self.prompt_tokens = 0
        self.generated_tokens = 0

    def accepted(self, prompt_tokens: int) -> None:
        """Note that the request is valid."""
        self.prompt_tokens = prompt_tokens
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def generated(self, tokens: int, outcome: str | None) -> None:
        """Note new tokens, and what the text ends with, if it ends."""
        if tokens:
            self._last_token = monotonic()
            self._metrics.generated_tokens.inc(tokens)
            self.generated_tokens += tokens
        if tokens and self._first_token is None:
            self._first_token = self._last_token
            self._metrics.ttft.observe(self._first_token - self._started)
        if outcome is not None:
            self.outcome = outcome

    def failed(self, error: BaseException) -> None:
        """Note what the request ended with instead of a text."""
        if isinstance(error, PrfaasError):
            self.outcome = error.kind
        elif isinstance(error, asyncio.CancelledError | ConnectionResetError):
            self.outcome = "cancelled"
        else:
            self.outcome = "server_error"

    def close(self) -> None:
        """Account for the request."""
        self._metrics.requests.labels(self.outcome).inc()
        if self._first_token is not None and self.generated_tokens > 1:
            decoding = self._last_token - self._first_token
            self._metrics.tpot.observe(decoding / (self.generated_tokens - 1))
        log.info(
            "completion",
            outcome=self.outcome,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            seconds=round(monotonic() - self._started, 3),
        )
