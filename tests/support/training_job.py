"""Training runs without Ray: worker, coordinator, hosts and channels in threads of one process.

tests/integration tests what Ray adds: processes, placement, Ray Train. Here a run of fifty steps takes a
second or two, so that many arrangements can be compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from actors.coordinator.training_steps import TrainingSteps
from actors.host import ExpertHost
from channels.base import Channel
from channels.choose import connect
from cluster.topology import HostInfo
from jobs.config.presets import preset
from jobs.config.run_config import RunConfig
from jobs.data.held_out import HeldOut
from jobs.data.packing import PackedCorpus, pack
from jobs.training.actor_builders import build_coordinator, build_host
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from jobs.training.run_start import RunStart
from jobs.training.worker_assembly import HostAccess, assemble_worker
from jobs.training.worker_group import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A stand-in for `jobs.data.corpus.PreparedData`: packed rows, made without Ray."""

    train: PackedCorpus
    held_out: HeldOut

    def save_tokenizer(self, directory: Path) -> None:
        """Save nothing: these tests have no tokenizer."""


@dataclass(kw_only=True)
class RunOutcome:
    """The result of a run.

    Attributes:
        losses: Main loss of each step, in nats.
        metrics: Lines of metrics.jsonl.
        trunk: Parameters and biases by name.
        experts: (w13, w2) by (layer, expert).
    """

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    trunk: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)


def tiny(**sections: dict[str, Any]) -> RunConfig:
    """The preset `tiny` with some fields changed: `tiny(training={"steps": 5})`."""
    values = preset("tiny").to_dict()
    for section, fields in sections.items():
        values[section] = {**values[section], **fields}
    return RunConfig.from_dict(values)


def text_corpus(config: RunConfig, text: str) -> Corpus:
    """Real text as bytes, one document a paragraph of several lines, packed for a configuration."""
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    documents = [np.frombuffer(part.encode(), dtype=np.uint8).astype(np.int32) for part in paragraphs]
    documents = [document % (config.model.vocab_size - 1) for document in documents]
    held = max(1, len(documents) // 20)

    def packed(some: Sequence[Any], *, pad: bool) -> PackedCorpus:
        return pack(
            some,
            sequence_length=config.training.sequence_length,
            depth=config.model.num_nextn_predict_layers,
            end_of_text=config.model.vocab_size - 1,
            pad=pad,
        )

    rows = packed(documents[:held], pad=True)
    size = sum(len(document) for document in documents[:held])
    return Corpus(
        train=packed(documents[held:], pad=False),
        held_out=HeldOut(rows=rows, documents=held, size=size, zlib_bits_per_byte=0.0),
    )


class ThreadReducer:
    """Sums tensors over workers that are threads, in the order of their ranks."""

    def __init__(self, workers: int) -> None:
        self._barrier = threading.Barrier(workers)
        self._given: list[Sequence[Tensor]] = [()] * workers

    def of(self, rank: int) -> _OfRank:
        return _OfRank(self, rank)

    def reduce(self, rank: int, tensors: Sequence[Tensor]) -> None:
        self._given[rank] = [tensor.clone() for tensor in tensors]
        self._barrier.wait(60)
        for at, tensor in enumerate(tensors):
            tensor.copy_(sum(given[at] for given in self._given))  # type: ignore[arg-type]
        self._barrier.wait(60)

    def abort(self) -> None:
        self._barrier.abort()


@dataclass
class _OfRank:
    group: ThreadReducer
    rank: int

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        self.group.reduce(self.rank, tensors)


@contextmanager
def serving(host: ExpertHost, channel: str) -> Iterator[HostInfo]:
    """A host behind a real server of one kind of channel."""
    from channels import local
    from channels.collective import channel as collective
    from channels.grpc import channel as grpc
    from channels.shm import channel as shm

    kinds = {"local": local.serve, "shm": shm.serve, "collective": collective.serve, "grpc": grpc.serve}
    server = kinds[channel](host.handle)
    try:
        yield HostInfo(id=host.id, addresses={channel: server.address})
    finally:
        server.close()


def train(
    config: RunConfig,
    corpus: Corpus,
    output: Path,
    *,
    start: RunStart | None = None,
    channel: str = "local",
    stop_after: int | None = None,
    on_step: Callable[[int, Sequence[ExpertHost]], None] | None = None,
    wrap: Callable[[Channel], Channel] = lambda channel: channel,
) -> RunOutcome:
    """Run a training job to its end; raises what a worker raised. `wrap` comes between lanes and channels."""
    start = start or RunStart(run="test")
    workers, n_hosts = config.training.workers, config.cluster.expert_hosts
    by_id: dict[str, ExpertHost] = {}

    def reach(info: HostInfo) -> ExpertHost:
        return by_id[info.id]

    hosts = [build_host(config, start, f"host-{i}", connect=reach) for i in range(n_hosts)]
    by_id.update({host.id: host for host in hosts})
    with ExitStack() as stack:
        infos = [stack.enter_context(serving(host, channel)) for host in hosts]
        coordinator = build_coordinator(config, start, output, control=reach)
        stack.callback(coordinator.close)
        for info in infos:
            coordinator.register_host(info)
        if n_hosts:
            coordinator.place_experts()
        reducer = ThreadReducer(workers)
        outcome = RunOutcome()
        errors: list[BaseException] = []

        def open_channel(info: HostInfo) -> Channel:
            return wrap(connect(info.addresses[channel]))

        def work(rank: int) -> None:
            try:
                made = assemble_worker(
                    config,
                    corpus,  # type: ignore[arg-type]
                    group=WorkerGroup(rank=rank, workers=workers, reducer=reducer.of(rank)),
                    start=start,
                    output=output,
                    coordinator=_WatchedCoordinator(coordinator.steps, hosts, on_step, stop_after),
                    hosts=HostAccess(table=coordinator.table(), connect=open_channel, reach=reach)
                    if n_hosts
                    else None,
                )
                try:
                    made.worker.run()
                    if rank == 0:
                        trunk = made.trunk
                        outcome.trunk = {k: v.clone() for k, v in trunk.model.state_dict().items()}
                        local = [trunk.experts] if isinstance(trunk.experts, ExpertHost) else []
                        outcome.experts = {
                            k: v for host in hosts or local for k, v in weights_of(host).items()
                        }
                finally:
                    made.close()
            except BaseException as error:
                errors.append(error)
                coordinator.steps.fail(f"worker {rank}: {error}")
                reducer.abort()

        threads = [
            threading.Thread(target=work, args=(rank,), name=f"worker-{rank}") for rank in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    outcome.metrics = read_metrics(output / METRICS_FILE)
    outcome.losses = [line["main_loss"] for line in outcome.metrics]
    return outcome


class _WatchedCoordinator:
    """A coordinator that calls a test after each step of worker 0, and lets it stop the run."""

    def __init__(
        self,
        inner: TrainingSteps,
        hosts: Sequence[ExpertHost],
        on_step: Callable[[int, Sequence[ExpertHost]], None] | None,
        stop_after: int | None,
    ) -> None:
        self._inner, self._hosts, self._on_step, self._stop_after = inner, hosts, on_step, stop_after

    def report(self, report: Any) -> Any:
        if self._stop_after is not None and report.step + 1 >= self._stop_after:
            self._inner.request_stop()
        decision = self._inner.report(report)
        if self._on_step is not None and report.worker == 0:
            self._on_step(decision.step, self._hosts)
        return decision

    def join(self, rank: int, workers: int, attempt: int, why: str) -> Any:
        return self._inner.join(rank, workers, attempt, why)

    def table(self) -> Any:
        return self._inner.table()

    def save(self, directory: str, step: int) -> list[str]:
        return self._inner.save(directory, step)

    def metrics(self, since_step: int = -1) -> Any:
        return self._inner.metrics(since_step)


def difference(one: RunOutcome, other: RunOutcome) -> tuple[float, float, float]:
    """Largest differences of losses, of weights (trunk and experts), and of the gates' biases."""
    assert len(one.losses) == len(other.losses)
    assert one.experts.keys() == other.experts.keys()
    assert one.trunk.keys() == other.trunk.keys()
    losses = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    bias = [name for name in one.trunk if name.endswith("e_score_correction_bias")]
    weights = max(_apart(one.trunk[name], other.trunk[name]) for name in one.trunk if name not in bias)
    for key, pair in one.experts.items():
        weights = max(weights, *(_apart(a, b) for a, b in zip(pair, other.experts[key], strict=True)))
    return losses, weights, max(_apart(one.trunk[name], other.trunk[name]) for name in bias)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def weights_of(host: ExpertHost) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    return {(layer, expert): (w13.clone(), w2.clone()) for layer, expert, w13, w2 in host.weights()}


__all__ = ["Corpus", "RunOutcome", "ThreadReducer", "difference", "text_corpus", "tiny", "train"]
