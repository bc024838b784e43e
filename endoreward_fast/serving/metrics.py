"""What Prometheus reads at /metrics. Each server has its own registry."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OTHER = "other"
"""for what was asked of paths that the server does not have, or before the path was looked at"""
FILLS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1, 2)


class Metrics:
    """The counters of one server. It is the `Watch` of a Batcher."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "endoreward", "registry": self.registry}
        self._requests = Counter("requests", "Requests, by path and status", ("path", "status"), **own)
        self._seconds = Histogram(
            "request_seconds", "Time from a request to its answer", ("path",), buckets=SECONDS, **own
        )
        self._rows = Counter("rows", "Rows, by whether they have a score", ("outcome",), **own)
        self._tokens = Counter("tokens", "Tokens of scored rows, prompts included", **own)
        self._rounds = Counter("rounds", "Lists of rows that were scored together", **own)
        self._round_rows = Histogram("round_rows", "Rows of a round", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), **own)
        self._fill = Histogram("round_fill", "Tokens of a round over its budget", buckets=FILLS, **own)
        self._round_seconds = Histogram("round_seconds", "Time that a round took", buckets=SECONDS, **own)
        self._wait = Histogram("wait_seconds", "Time that a request waited for its first round", buckets=SECONDS, **own)
        self.queue_rows = Gauge("queue_rows", "Rows of requests that are not answered", **own)
        self.queue_tokens = Gauge("queue_tokens", "Tokens that wait for a round", **own)
        self.ready = Gauge("ready", "1 if the model is loaded and the server takes requests", **own)

    def on_round(self, rows: int, tokens: int, fill: float, seconds: float) -> None:
        """Note a round: its rows and tokens, tokens over the round's budget, and the time it took."""
        self._rounds.inc()
        self._round_rows.observe(rows)
        self._tokens.inc(tokens)
        self._fill.observe(fill)
        self._round_seconds.observe(seconds)

    def on_wait(self, seconds: float) -> None:
        """Note the time that a request waited for its first round."""
        self._wait.observe(seconds)

    def on_rows(self, scored: int, unscored: int) -> None:
        """Note the rows of an answer."""
        self._rows.labels("scored").inc(scored)
        self._rows.labels("unscored").inc(unscored)

    def on_request(self, path: str, status: int, seconds: float) -> None:
        """Note an answer. `path` is one that the server has, or OTHER."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self.registry)
