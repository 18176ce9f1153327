"""Workers of a training run as processes with a gloo process group, and the moments at which they fail.

`Workers` does what Ray Train does for a run: it starts the workers, and restarts all when one is lost.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from actors.host.host_server import ExpertHostServer
from actors.rpc.coordinator_client import CoordinatorClient
from actors.rpc.host_client import HostClient
from channels.base import Channel, Phase, Request
from cluster.topology import HostInfo
from errors import ChannelError
from jobs.config.run_config import RunConfig
from jobs.fleet.expert_hosts import connector
from jobs.training.actor_builders import build_host
from jobs.training.run_start import RunStart
from jobs.training.worker_assembly import HostAccess, assemble_worker
from jobs.training.worker_group import WorkerGroup
from support.training_job import Corpus

_PATIENCE = 60.0  # seconds to wait for any result


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A request in the middle of a step, at which a process ends.

    Attributes:
        at: Index of the request among those of this phase and step that the process sees.
    """

    step: int
    phase: Phase
    at: int = 0


class _Doom:
    """Ends the process at a moment."""

    def __init__(self, moment: Moment) -> None:
        self._moment, self._seen = moment, 0

    def see(self, request: Request) -> None:
        if (request.id.step, request.id.phase) == (self._moment.step, self._moment.phase):
            if self._seen == self._moment.at:
                os._exit(1)
            self._seen += 1


class _Cut:
    """Fails all requests from a moment on, until the run goes on under another epoch."""

    def __init__(self, moment: Moment) -> None:
        self._moment, self._seen = moment, 0
        self._epoch: int | None = None

    def see(self, request: Request) -> None:
        if (request.id.step, request.id.phase) == (self._moment.step, self._moment.phase):
            if self._seen == self._moment.at:
                self._epoch = request.id.epoch
            self._seen += 1
        if request.id.epoch == self._epoch:
            raise ChannelError("the network is gone")


class _WatchedChannel:
    """A channel that shows its requests to a fault first."""

    def __init__(self, inner: Channel, doom: _Doom | _Cut) -> None:
        self._inner, self._doom = inner, doom

    def submit(self, request: Request) -> Any:
        self._doom.see(request)
        return self._inner.submit(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """The run that a worker takes part in, and its place there.

    Attributes:
        meeting: File by which the workers of a process group find each other.
        end: When the worker's process ends.
        cut: When the worker stops reaching hosts, until the run goes on in another epoch.
    """

    rank: int
    workers: int
    config: dict[str, Any]
    corpus: Corpus
    start: RunStart
    output: Path
    coordinator: str
    meeting: Path
    end: Moment | None = None
    cut: Moment | None = None


@dataclass(kw_only=True)
class WorkerResult:
    """The state of a worker at the end of a run.

    Attributes:
        trunk: Whole tensors by name.
        state_bytes, gradient_bytes: Bytes of values and moments, and of the last step's gradients.
    """

    trunk: dict[str, Tensor] = field(default_factory=dict)
    state_bytes: int = 0
    gradient_bytes: int = 0


def _work(job: WorkerJob) -> WorkerResult:
    from jobs.training.ray_worker import ProcessGroupReducer

    config = RunConfig.from_dict(job.config)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{job.meeting}", rank=job.rank, world_size=job.workers
    )
    sharded = config.training.trunk_sharding == "fsdp"
    coordinator = CoordinatorClient(job.coordinator, timeout=_PATIENCE)
    connect = connector(config.cluster, torch.device("cpu"))
    doom = _Doom(job.end) if job.end is not None else _Cut(job.cut) if job.cut is not None else None
    if doom is not None:
        opened = connect
        connect = lambda host: _WatchedChannel(opened(host), doom)  # type: ignore[assignment,return-value]  # noqa: E731
    hosts = None
    if config.cluster.expert_hosts:
        reach = partial(HostClient, timeout=_PATIENCE)
        hosts = HostAccess(table=coordinator.table(), connect=connect, reach=reach)
    made = assemble_worker(
        config,
        job.corpus,  # type: ignore[arg-type]
        group=WorkerGroup(
            rank=job.rank,
            workers=job.workers,
            reducer=ProcessGroupReducer(),
            mesh=init_device_mesh("cpu", (job.workers,)) if sharded else None,
        ),
        start=job.start,
        output=job.output,
        coordinator=coordinator,
        hosts=hosts,
    )
    share = WorkerResult()
    apply = made.trunk.apply

    def watched(decision: Any) -> None:
        gradients = (p.grad for p in made.trunk.model.parameters() if p.grad is not None)
        share.gradient_bytes = sum(_local(one).nbytes for one in gradients)
        apply(decision)

    made.trunk.apply = watched  # type: ignore[method-assign]
    try:
        made.worker.run()
        parameters = made.trunk.parameters
        share.trunk = {name: one.clone() for name, one in parameters.whole()}
        share.state_bytes = sum(one.nbytes for one in parameters.state().values())
        return share
    finally:
        made.close()
        coordinator.close()
        torch.distributed.destroy_process_group()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _serve(pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)

    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_work(job))
        except BaseException as error:
            pipe.send(error)


def _doomed_host(pipe: Connection, config: dict[str, Any], start: RunStart, id: str, end: Moment) -> None:
    torch.set_num_threads(1)
    host = build_host(RunConfig.from_dict(config), start, id, connect=HostClient)
    doom, handle = _Doom(end), host.handle

    def seen(request: Request) -> Any:
        doom.see(request)
        return handle(request)

    host.handle = seen  # type: ignore[method-assign]
    pipe.send(ExpertHostServer(host).info)
    pipe.recv()


class Workers:
    """Worker processes that serve one run after the other."""

    def __init__(self) -> None:
        # Forked from a process that has imported torch, which takes each new process seconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "jobs.training.worker_group"])
        self._running: list[tuple[Any, Connection]] = []
        self._meetings = 0

    def run(self, jobs: list[WorkerJob]) -> list[WorkerResult | BaseException]:
        """Do all jobs at once; return the result of each, an `EOFError` where the process has ended."""
        while len(self._running) < len(jobs):
            self._running.append(self._begin(_serve))
        for (_, pipe), job in zip(self._running, jobs, strict=False):
            pipe.send(job)
        found: list[WorkerResult | BaseException] = []
        for _, pipe in self._running[: len(jobs)]:
            try:
                assert pipe.poll(2 * _PATIENCE), "a worker hangs"
                found.append(pipe.recv())
            except EOFError as error:
                found.append(error)
        if any(isinstance(one, BaseException) for one in found):
            self.close()  # as Ray Train does
        return found

    def meeting(self, directory: Path) -> Path:
        """A new name for the file by which the workers of a process group find each other."""
        self._meetings += 1
        return directory / f"meeting-{self._meetings}"

    @contextmanager
    def doomed_host(
        self, config: RunConfig, start: RunStart, id: str, end: Moment, lost: Callable[[], None]
    ) -> Iterator[HostInfo]:
        """A host in a process of its own that ends at a moment; `lost` is called afterwards."""
        process, pipe = self._begin(_doomed_host, config.to_dict(), start, id, end)
        info: HostInfo = pipe.recv()

        def watch() -> None:
            wait([process.sentinel])
            lost()

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield info
        finally:
            process.kill()
            watching.join()
            pipe.close()

    def close(self) -> None:
        for process, pipe in self._running:
            pipe.close()
            process.kill()
            process.join()
        self._running.clear()

    def _begin(self, target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        return process, mine


__all__ = ["Moment", "WorkerJob", "WorkerResult", "Workers"]
