"""Prometheus metrics of one replica, under the names that people chart for vLLM, with our prefix."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.service import Delta

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServingMetrics:
    """All of one replica's metrics, in a registry of their own.

    Args:
        model: label of all of them.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        labels = ["model_name"]

        def counter(name: str, text: str) -> Counter:
            made: Counter = Counter(f"raymoe_{name}", text, labels, registry=self.registry).labels(model)
            return made

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made: Histogram = Histogram(
                f"raymoe_{name}", text, labels, registry=self.registry, buckets=buckets
            ).labels(model)
            return made

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.first_token = histogram("time_to_first_token_seconds", "From request to first token.", _FAST)
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens.", _FAST)
        self.whole = histogram("e2e_request_latency_seconds", "From request to last token.", _SLOW)
        self._success = Counter(
            "raymoe_request_success",
            "Requests that ended well.",
            [*labels, "finished_reason"],
            registry=self.registry,
        )
        self._failure = counter("request_failure", "Requests that ended with an error.")

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A figure that is read when it is asked for."""
        Gauge(f"raymoe_{name}", text, ["model_name"], registry=self.registry).labels(
            self._model
        ).set_function(read)

    def timing(self, began: float) -> Timing:
        """The clock of one request that began at `began` (of `time.perf_counter`)."""
        return Timing(self, began)

    def finished(self, reason: str) -> None:
        """A choice has ended."""
        self._success.labels(self._model, reason).inc()

    def failed(self) -> None:
        """A choice has ended with an error."""
        self._failure.inc()

    def exposition(self) -> bytes:
        """What Prometheus reads."""
        text: bytes = generate_latest(self.registry)
        return text


class Timing:
    """Measures one request."""

    def __init__(self, metrics: ServingMetrics, began: float) -> None:
        self._metrics, self._began = metrics, began
        self._last: dict[int, float] = {}

    def note(self, index: int, delta: Delta) -> None:
        """A delta of choice `index` has come."""
        now, metrics = time.perf_counter(), self._metrics
        if delta.tokens:
            metrics.generation_tokens.inc(len(delta.tokens))
            last = self._last.get(index)
            if last is None:
                metrics.first_token.observe(now - self._began)
            else:
                for _ in delta.tokens:
                    metrics.inter_token.observe((now - last) / len(delta.tokens))
            self._last[index] = now
        if delta.error is not None:
            metrics.failed()
        elif delta.finish_reason is not None:
            metrics.finished(delta.finish_reason)
            metrics.whole.observe(now - self._began)


__all__ = ["ServingMetrics", "Timing"]
