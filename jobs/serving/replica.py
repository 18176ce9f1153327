"""One replica of the trunk, put together: weights, engine, its way to the experts, its interface."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.clients import HostClient
from actors.expert_host import ExpertHost
from actors.lane import Lane
from actors.router import Router
from cluster.topology import RoutingTable
from engine.engine import Engine
from engine.service import EngineService
from engine.weights import TrunkWeights
from errors import RaymoeError
from jobs.api.backend import Backend
from jobs.api.chat import ChatTemplate
from jobs.api.metrics import ServingMetrics
from jobs.hosts import connector, experts_of, host_threads
from jobs.serving.config import ServeConfig
from jobs.tokenizer import load_tokenizer
from jobs.weights import compute_dtype
from model.checkpoint import PretrainedSource, load_pretrained
from model.experts import Experts
from model.transformer import Transformer

_HEALTH_SECONDS = 1.0  # a finding is not older than this


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A replica's parts."""

    backend: Backend
    router: Router | None

    def close(self) -> None:
        """End the engine's thread and hang up on the hosts."""
        self.backend.service.close()
        if self.router is not None:
            self.router.close()


def serving_dtype(config: ServeConfig, directory: Path) -> torch.dtype:
    """Of trunk, rows and experts: the weights' own where the machine computes in it, else float32."""
    if config.serving.dtype == "auto":
        return compute_dtype(directory)
    dtype: torch.dtype = getattr(torch, config.serving.dtype)
    return dtype


def weights_version(directory: Path) -> str:
    """A short name of a directory's weights: equal for equal files, as far as names, sizes and times tell."""
    digest = hashlib.blake2s(digest_size=6)
    for file in sorted(directory.glob("*.safetensors")):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{directory.name}-{digest.hexdigest()}"


def build_serving_host(config: ServeConfig, directory: Path, index: int) -> ExpertHost:
    """Expert host number `index`, in its own process."""
    dtype = serving_dtype(config, directory)
    source = PretrainedSource(directory, dtype=dtype)
    return ExpertHost(
        f"host-{index}",
        source.config,
        experts_of(source.config, config.cluster, index),
        source,
        dtype=dtype,
        threads=host_threads(config.cluster),
    )


def build_replica(
    config: ServeConfig,
    directory: Path,
    *,
    name: str,
    run: str,
    table: RoutingTable | None,
    refresh: Callable[[], RoutingTable] | None = None,
) -> Served:
    """Load the trunk and connect it to its experts.

    Args:
        directory: with weights and a tokenizer.
        name: of the replica, unique within the deployment.
        run: the deployment.
        table: of the expert hosts; None loads the experts into this process.

    Raises:
        CheckpointError: the weights are incomplete or of another architecture.
        DataError: there is no tokenizer.
    """
    serving = config.serving
    if serving.threads is not None:
        torch.set_num_threads(serving.threads)
    dtype = serving_dtype(config, directory)
    modules = serving.drafts != 0
    router: Router | None = None
    lane: Lane | None = None
    experts: Experts
    if table is None:
        whole = load_pretrained(directory, dtype=dtype)
        weights, experts = TrunkWeights.of(whole.trunk, modules=modules), whole.experts
    else:
        source = PretrainedSource(directory, dtype=dtype)
        weights = _trunk(source, dtype, modules=modules)
        router = Router(
            name=name,
            run=run,
            config=source.config,
            table=table,
            connect=connector(config.cluster),
            refresh=refresh,
            timeout=config.cluster.call_timeout,
        )
        lane = router.lane(0)
        experts = lane
    tokenizer, end_of_text = load_tokenizer(directory, weights.config.vocab_size)
    engine = Engine(
        weights,
        experts,
        serving.engine_settings(),
        end_of_text=[end_of_text],
        vocabulary=tokenizer.get_vocab_size(),
        on_step=None if lane is None else lambda step: lane.begin(step, 0),
    )
    service = EngineService(engine, tokenizer, abandon=None if lane is None else lane.abandon)
    title = serving.name or directory.name
    metrics = ServingMetrics(title)
    _engine_gauges(metrics, engine, service)
    backend = Backend(
        model=title,
        version=weights_version(directory),
        service=service,
        tokenizer=tokenizer,
        chat=ChatTemplate.beside(directory),
        longest=engine.longest,
        end_of_text=end_of_text,
        limits=serving.limits(),
        health=HostsHealth(table, timeout=5.0),
        metrics=metrics,
    )
    return Served(backend=backend, router=router)


class HostsHealth:
    """Asks every expert host for a sign of life, at most once a second."""

    def __init__(self, table: RoutingTable | None, *, timeout: float) -> None:
        self._clients = [HostClient(host, timeout=timeout) for host in table.hosts] if table else []
        self._asked = float("-inf")
        self._reason: str | None = None

    def __call__(self) -> str | None:
        """What is wrong, or None."""
        if time.monotonic() - self._asked > _HEALTH_SECONDS:
            self._reason = self._ask()
            self._asked = time.monotonic()
        return self._reason

    def _ask(self) -> str | None:
        for client in self._clients:
            try:
                client.stats()
            except RaymoeError as error:
                return str(error)
        return None


def _trunk(source: PretrainedSource, dtype: torch.dtype, *, modules: bool) -> TrunkWeights:
    with torch.device("meta"):
        model = Transformer(source.config, dtype=dtype)
    model = model.to_empty(device="cpu")
    model.tie()
    model.load_state_dict(source.trunk())
    return TrunkWeights.of(model, modules=modules)


def _engine_gauges(metrics: ServingMetrics, engine: Engine, service: EngineService) -> None:
    """Figures that the engine keeps, under vLLM's names."""
    pool, stats = engine.pool, engine.stats
    metrics.gauge("num_requests_running", "Requests that run.", lambda: service.load[0])
    metrics.gauge("num_requests_waiting", "Requests that wait.", lambda: service.load[1])
    metrics.gauge("kv_cache_usage_perc", "Share of the cache in use.", lambda: pool.held / pool.n_pages)
    metrics.gauge(
        "num_preemptions", "Requests set back for want of pages.", lambda: engine.scheduler.preemptions
    )
    metrics.gauge("spec_decode_num_drafts", "Rounds of drafts.", lambda: stats.proposed[0])
    metrics.gauge("spec_decode_num_draft_tokens", "Drafts judged.", lambda: sum(stats.proposed.values()))
    metrics.gauge(
        "spec_decode_num_accepted_tokens", "Drafts that were right.", lambda: sum(stats.accepted.values())
    )


__all__ = [
    "HostsHealth",
    "Served",
    "build_replica",
    "build_serving_host",
    "serving_dtype",
    "weights_version",
]
