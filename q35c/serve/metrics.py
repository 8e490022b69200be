"""Numbers for Prometheus. Labels come from fixed sets, so that no client can make the series grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from q35c.serve.errors import describe
from q35c.serve.request import Serving, Statistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CANCEL_REASONS = ("disconnect", "drain")
REJECT_REASONS = ("overloaded", "draining", "key", "host", "invalid")
FINISH_REASONS = ("stop", "length", "tool_calls", "cancelled")


class Metrics:
    """The server's own numbers, and the engine's as they are when somebody looks."""

    def __init__(self, engine: Serving, routes: Iterable[str]) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "q35c_requests", "Requests answered.", ("route", "status"), registry=registry
        )
        self._finished = Counter(
            "q35c_answers", "Rows by why they ended.", ("reason",), registry=registry
        )
        self._cancelled = Counter(
            "q35c_cancelled", "Requests given up.", ("reason",), registry=registry
        )
        self._rejected = Counter(
            "q35c_rejected", "Requests refused.", ("reason",), registry=registry
        )
        self._failed = Counter(
            "q35c_stream_failures", "Streams ended by an error.", registry=registry
        )
        self._unknown = Counter(
            "q35c_unknown_fields", "Fields of requests that were ignored.", registry=registry
        )
        self._ttft = _histogram(registry, "ttft", "Seconds from request to first token.", _LONG)
        self._itl = _histogram(registry, "itl", "Seconds between tokens of a row.", _SHORT)
        self._e2e = _histogram(registry, "e2e", "Seconds from request to the row's end.", _LONG)
        self._queue = _histogram(registry, "queue", "Seconds from request to admission.", _LONG)
        for reason in FINISH_REASONS:
            self._finished.labels(reason)
        for reason in CANCEL_REASONS:
            self._cancelled.labels(reason)
        for reason in REJECT_REASONS:
            self._rejected.labels(reason)
        self._routes = frozenset(routes)
        registry.register(_EngineNumbers(engine))

    def answered(self, route: str, status: int) -> None:
        """Count a request; an unknown path is one route whatever it says. Status 0: the client had gone."""
        self._requests.labels(route if route in self._routes else "other", str(status)).inc()

    def count_unknown_fields(self, count: int) -> None:
        self._unknown.inc(count)

    def count_rejected(self, status: int) -> None:
        """Count a refusal by its kind; what failed by our own fault is none."""
        reasons = {429: "overloaded", 503: "draining", 401: "key", 421: "host"}
        if status < 500 or status == 503:
            self._rejected.labels(reasons.get(status, "invalid")).inc()

    def count_cancelled(self, reason: str) -> None:
        self._cancelled.labels(reason).inc()

    def count_failed(self, error: BaseException) -> None:
        """Count a stream that broke off; a drain is no failure."""
        if describe(error).status == 503:
            self._cancelled.labels("drain").inc()
        self._failed.inc()

    def started(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._itl.observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        self._finished.labels(reason).inc()
        self._e2e.observe(seconds)

    def text(self) -> bytes:
        """Return all numbers in Prometheus' text form."""
        return generate_latest(self._registry)


def _histogram(
    registry: CollectorRegistry, name: str, what: str, buckets: tuple[float, ...]
) -> Histogram:
    return Histogram(f"q35c_{name}_seconds", what, buckets=buckets, registry=registry)


class _EngineNumbers(Collector):
    """Turn the engine's statistics into metrics at the moment somebody looks."""

    def __init__(self, engine: Serving) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        numbers = self._engine.statistics()
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"q35c_{name}", what, value=getattr(numbers, name))
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"q35c_{name}", what, value=getattr(numbers, name))
        yield _labelled(GaugeMetricFamily, "state_bytes", "Bytes of sessions.", "kind", numbers)
        yield _labelled(CounterMetricFamily, "misses", "Prefix misses.", "reason", numbers)
        yield _labelled(CounterMetricFamily, "rows", "Decode steps by rows.", "rows", numbers)


_GAUGES = {
    "running": "Rows being answered.",
    "waiting": "Requests waiting for a row.",
    "waiting_tokens": "Prompt tokens of waiting requests.",
    "step_stall_ratio": "How much longer steps take than the best with as many rows.",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of admitted requests.",
    "cached_tokens": "Prompt tokens that were not computed again.",
    "generated_tokens": "Generated tokens.",
    "steps": "Decode steps.",
    "prefill_slices": "Slices of prompts.",
    "evictions": "Cached prefixes given up.",
    "grammar_seconds": "Seconds spent in grammars.",
}


def _labelled(
    family: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    what: str,
    label: str,
    numbers: Statistics,
) -> Metric:
    made = family(f"q35c_{name}", what, labels=[label])
    for key, value in getattr(numbers, name).items():
        made.add_metric([str(key)], value)
    return made
