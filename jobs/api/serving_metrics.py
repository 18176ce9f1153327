"""Prometheus metrics of the interface, the engines and the expert hosts, with vLLM's names and our prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.delta import Delta

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """State and counters of one engine.

    Attributes:
        running, waiting: Number of requests.
        pages_held, pages: Pages of the KV cache in use, and in all.
        preemptions: Requests preempted because the cache was full.
        requests: Requests accepted since the start, including those continued from another engine.
        drafts, draft_tokens, accepted_tokens: Rounds of drafts, drafts verified, and drafts accepted.
    """

    running: int
    waiting: int
    pages_held: int
    pages: int
    preemptions: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFigures:
    """State of a deployment's expert hosts.

    Attributes:
        wanted, hosts: Number of hosts that there should be, and of those that serve and answer.
        replicas: Number of hosts of the expert that is on the fewest.
        in_flight: Rows that wait or are computed, on all hosts.
        balancedness: Mean load of the hosts over the highest; None before loads are known.
    """

    wanted: int
    hosts: int
    replicas: int
    in_flight: int
    balancedness: float | None

    @classmethod
    def of(cls, status: Mapping[str, Any]) -> Self:
        """The figures in a job's status, the object of `raymoe status --json`."""
        there = [host for host in status["hosts"] if host["state"] == "serving" and host["answers"]]
        return cls(
            wanted=status["wanted"],
            hosts=len(there),
            replicas=status["replicas_min"],
            in_flight=sum(host["in_flight"] for host in there),
            balancedness=status["balancedness"],
        )


class ServingMetrics(Collector):
    """All metrics of one process of the interface, in a registry of their own.

    Attributes:
        engines: The engines' figures by name, set before each exposition.
        experts: The expert hosts' figures; None without hosts, or if they are unknown.

    Args:
        model: Name of the model, a label of all metrics.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self.engines: Mapping[str, EngineFigures] = {}
        self.experts: ExpertFigures | None = None
        self.registry.register(self)
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

    def collect(self) -> Iterator[Metric]:
        """Gauges of the engines and expert hosts; called by the registry."""
        for name, text, read in _GAUGES:
            family = GaugeMetricFamily(f"raymoe_{name}", text, labels=["model_name", "engine"])
            for engine, figures in self.engines.items():
                family.add_metric([self._model, engine], read(figures))
            yield family
        for name, text, tell in _EXPERTS:
            family = GaugeMetricFamily(f"raymoe_{name}", text, labels=["model_name"])
            value = None if self.experts is None else tell(self.experts)
            if value is not None:
                family.add_metric([self._model], value)
            yield family

    def timing(self, began: float) -> Timing:
        """The measurement of a request that began at `began`, by `time.perf_counter`."""
        return Timing(self, began)

    def finished(self, reason: str) -> None:
        """Count a choice that ended well."""
        self._success.labels(self._model, reason).inc()

    def failed(self) -> None:
        """Count a choice that ended with an error."""
        self._failure.inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        text: bytes = generate_latest(self.registry)
        return text


_GAUGES: tuple[tuple[str, str, Callable[[EngineFigures], float]], ...] = (
    ("num_requests_running", "Requests that run.", lambda at: at.running),
    ("num_requests_waiting", "Requests that wait.", lambda at: at.waiting),
    ("kv_cache_usage_perc", "Share of the cache in use.", lambda at: at.pages_held / at.pages),
    ("engine_requests", "Requests taken, also those begun by another engine.", lambda at: at.requests),
    ("num_preemptions", "Requests set back for want of pages.", lambda at: at.preemptions),
    ("spec_decode_num_drafts", "Rounds of drafts.", lambda at: at.drafts),
    ("spec_decode_num_draft_tokens", "Drafts verified.", lambda at: at.draft_tokens),
    ("spec_decode_num_accepted_tokens", "Drafts that were right.", lambda at: at.accepted_tokens),
)

_EXPERTS: tuple[tuple[str, str, Callable[[ExpertFigures], float | None]], ...] = (
    ("expert_hosts_wanted", "Expert hosts that there should be.", lambda at: at.wanted),
    ("expert_hosts", "Expert hosts that serve and answer.", lambda at: at.hosts),
    ("expert_replicas_min", "Hosts that hold an expert, at least.", lambda at: at.replicas),
    ("expert_rows_in_flight", "Rows at the expert hosts.", lambda at: at.in_flight),
    ("expert_balancedness", "Mean over highest load of the hosts.", lambda at: at.balancedness),
)


class Timing:
    """Measures the latencies of one request."""

    def __init__(self, metrics: ServingMetrics, began: float) -> None:
        self._metrics, self._began = metrics, began
        self._last: dict[int, float] = {}

    def note(self, ready: Sequence[tuple[int, Delta]]) -> None:
        """Record deltas that have arrived together, each with the index of its choice.

        The time since a choice's last token is shared by all of its tokens that arrive together. So the sum
        of a choice's latencies is the time from its first token to its last, and their number that of its
        tokens after the first.
        """
        now, metrics = time.perf_counter(), self._metrics
        for index, count in self._counts(ready).items():
            metrics.generation_tokens.inc(count)
            last = self._last.get(index)
            if last is None:
                metrics.first_token.observe(now - self._began)
                last, count = now, count - 1
            for _ in range(count):
                metrics.inter_token.observe((now - last) / count)
            self._last[index] = now
        for _, delta in ready:
            if delta.error is not None:
                metrics.failed()
            elif delta.finish_reason is not None:
                metrics.finished(delta.finish_reason)
                metrics.whole.observe(now - self._began)

    @staticmethod
    def _counts(ready: Sequence[tuple[int, Delta]]) -> dict[int, int]:
        """Number of new tokens of each choice that has any."""
        counts: dict[int, int] = {}
        for index, delta in ready:
            if delta.tokens:
                counts[index] = counts.get(index, 0) + len(delta.tokens)
        return counts


__all__ = ["EngineFigures", "ExpertFigures", "ServingMetrics", "Timing"]
