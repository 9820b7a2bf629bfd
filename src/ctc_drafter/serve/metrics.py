"""Prometheus metrics, and the server's log as text or JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ctc_drafter.serve.engine import Engine

PREFIX = "ctc_drafter_"
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/responses",
    "/v1/ctc/stream",
    "/health",
    "/metrics",
    "/",
)


class EngineCollector(Collector):
    """Prometheus collector of an engine's totals."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        load = self.engine.load()
        yield gauge("running_rows", "Rows that are being decoded.", load.running)
        yield gauge("queue_length", "Rows that wait.", load.waiting)
        speedup = self.engine.speedup
        if speedup is not None:
            text = "Estimated speedup γ: plain steps for the same tokens, timed at the start, over the time taken."
            yield gauge("gamma_estimate", text, speedup.gamma)
        tokens = CounterMetricFamily(PREFIX + "tokens", "Tokens that were written.", labels=["lane"])
        steps = CounterMetricFamily(PREFIX + "verifications", "Verifications of a row.", labels=["lane"])
        beta = GaugeMetricFamily(PREFIX + "beta", "Acceptance length β: tokens per verification.", labels=["lane"])
        text = "Verifications that accepted at least so many drafted tokens."
        depths = CounterMetricFamily(PREFIX + "accepted", text, labels=["lane", "depth"])
        stages = CounterMetricFamily(PREFIX + "stage_seconds", "Time by stage.", labels=["lane", "stage"])
        for name, batch in self.engine.batches.items():
            tokens.add_metric([name], batch.stats.tokens)
            steps.add_metric([name], batch.stats.steps)
            beta.add_metric([name], batch.stats.beta)
            histogram = list(batch.stats.accept_histogram)
            for depth in range(1, len(histogram)):
                depths.add_metric([name, str(depth)], sum(histogram[depth:]))
            for stage, milliseconds in dict(batch.clock.total_ms).items():
                stages.add_metric([name, stage], milliseconds / 1e3)
        yield from (tokens, steps, beta, depths, stages)


class Metrics:
    """The registry of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        labels = ["path", "status"]
        self._requests = Counter(PREFIX + "requests", "Requests by path and status.", labels, registry=self.registry)
        buckets = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self._seconds = Histogram(
            PREFIX + "request_seconds", "Time of requests.", ["path"], buckets=buckets, registry=self.registry
        )

        text = "Unknown fields of requests that were left out (--lenient)."
        self._ignored = Counter(PREFIX + "ignored_fields", text, registry=self.registry)

    def ignored(self, fields: int) -> None:
        """So many fields of a request were left out; their names are the clients' and no label."""
        self._ignored.inc(fields)

    def count(self, path: str, status: int, seconds: float) -> None:
        """status 0: the client went away before an answer. Paths of others' making share one name."""
        known = path if path in PATHS else "other"
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


# The log: one line each, as text or as JSON.


class JsonLines(logging.Formatter):
    """Records as JSON objects; a request has fields of its own (`middleware.log_request`)."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told)


def log_to_stderr(level: str, form: str) -> None:
    """Sends the log of this process to stderr. level: the least that is told. form: `text` or `json`."""
    handler = logging.StreamHandler()
    handler.setLevel(level.upper())
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("ctc_drafter.serve").setLevel(min(logging.INFO, handler.level))
