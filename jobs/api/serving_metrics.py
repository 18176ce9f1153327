"""Prometheus metrics of the interface and of the engines behind it, with vLLM's names and our prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.service import Delta

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """How an engine stands.

    Attributes:
        running, waiting: requests.
        pages_held, pages: of the cache, in use and all.
        preemptions: requests set back for want of pages.
        requests: taken since it began, those that another engine had begun among them.
        drafts, draft_tokens, accepted_tokens: rounds of drafts, drafts judged, and those that were right.
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
    """How the expert hosts stand.

    Attributes:
        wanted, hosts: how many there should be, and how many serve and answer.
        replicas: least number of hosts that hold an expert.
        in_flight: rows that wait or are computed, on all hosts.
        balancedness: mean over highest load of the hosts; None before loads are known.
    """

    wanted: int
    hosts: int
    replicas: int
    in_flight: int
    balancedness: float | None

    @classmethod
    def of(cls, status: Mapping[str, Any]) -> Self:
        """Of what `raymoe status --json` shows."""
        there = [host for host in status["hosts"] if host["state"] == "serving" and host["answers"]]
        return cls(
            wanted=status["wanted"],
            hosts=len(there),
            replicas=status["replicas_min"],
            in_flight=sum(host["in_flight"] for host in there),
            balancedness=status["balancedness"],
        )


class ServingMetrics(Collector):
    """All metrics, in a registry of their own.

    Attributes:
        engines: their figures by their names, as they were asked for last.
        experts: those of the expert hosts; None where there are none or nobody knows.

    Args:
        model: label of all of them.
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
        """The engines' figures, for the registry."""
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


_GAUGES: tuple[tuple[str, str, Callable[[EngineFigures], float]], ...] = (
    ("num_requests_running", "Requests that run.", lambda at: at.running),
    ("num_requests_waiting", "Requests that wait.", lambda at: at.waiting),
    ("kv_cache_usage_perc", "Share of the cache in use.", lambda at: at.pages_held / at.pages),
    ("engine_requests", "Requests taken, also those begun by another engine.", lambda at: at.requests),
    ("num_preemptions", "Requests set back for want of pages.", lambda at: at.preemptions),
    ("spec_decode_num_drafts", "Rounds of drafts.", lambda at: at.drafts),
    ("spec_decode_num_draft_tokens", "Drafts judged.", lambda at: at.draft_tokens),
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


__all__ = ["EngineFigures", "ExpertFigures", "ServingMetrics", "Timing"]
