"""Metrics of the server in the format of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServerMetrics:
    """Counters and histograms of one server, in a registry of its own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "gptjax_requests", "HTTP requests by path and status.", ["path", "status"], registry=self._registry
        )
        self.disconnects = Counter(
            "gptjax_disconnects", "Requests whose client closed the connection.", registry=self._registry
        )
        self.prompt_tokens = Counter("gptjax_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.completion_tokens = Counter("gptjax_completion_tokens", "Tokens of completions.", registry=self._registry)
        self.request_seconds = self._histogram("gptjax_request_seconds", "Time from a request to its last byte.")
        self.queue_seconds = self._histogram("gptjax_queue_seconds", "Time that a completion waits for a row.")
        self.first_token_seconds = self._histogram("gptjax_first_token_seconds", "Time to the first token.")
        self.token_seconds = self._histogram("gptjax_token_seconds", "Time between the tokens of a completion.")

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(name, description, buckets=_SECONDS, registry=self._registry)

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when the metrics are."""
        Gauge(f"gptjax_{name}", description, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Returns the metrics in the exposition format."""
        return generate_latest(self._registry)
