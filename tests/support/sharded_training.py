"""Training runs whose workers are processes with a gloo process group; hosts and coordinator run here."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.coordinator.servicer import CoordinatorServicer
from actors.host.host_server import ExpertHostServer
from actors.rpc.control_server import ControlServer
from actors.rpc.host_client import HostClient
from errors import WorkersLost
from jobs.config.run_config import RunConfig
from jobs.training.actor_builders import build_coordinator, build_host
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from jobs.training.run_start import RunStart
from protos import coordinator_pb2_grpc
from support.training_job import Corpus, RunOutcome, weights_of
from support.worker_processes import Moment, WorkerJob, WorkerResult, Workers


def train_sharded(
    workers: Workers,
    config: RunConfig,
    corpus: Corpus,
    output: Path,
    *,
    start: RunStart | None = None,
    stop_after: int | None = None,
    lose_host: Moment | None = None,
    lose_worker: Moment | None = None,
    cut_worker: Moment | None = None,
    go_on_with: int | None = None,
) -> tuple[RunOutcome, list[WorkerResult], list[tuple[str, float]]]:
    """Run a training job to its end; raises what a worker raised.

    Args:
        lose_host: When the last host's process ends.
        cut_worker: When the last worker stops reaching hosts, until the run goes on in another epoch.
        lose_worker: When the last worker's process ends; `go_on_with` workers are started afterwards.

    Returns:
        The outcome, every worker's state, and the run's interruptions.
    """
    start = start or RunStart(run="test")
    n_hosts, n_workers = config.cluster.expert_hosts, config.training.workers
    with ExitStack() as stack:
        coordinator = build_coordinator(config, start, output)
        stack.callback(coordinator.close)
        steps = coordinator.steps
        report = steps.report

        def watched(one: Any) -> Any:
            if stop_after is not None and one.step + 1 >= stop_after:
                steps.request_stop()
            return report(one)

        steps.report = watched  # type: ignore[method-assign]
        hosts = [
            build_host(config, start, f"host-{i}", connect=HostClient)
            for i in range(n_hosts - (lose_host is not None))
        ]
        for host in hosts:
            server = ExpertHostServer(host)
            stack.callback(server.close)
            coordinator.register_host(server.info)
        if lose_host is not None:
            doomed = f"host-{n_hosts - 1}"
            lost = partial(coordinator.roster.lose, doomed, "its process ended")
            info = stack.enter_context(workers.doomed_host(config, start, doomed, lose_host, lost))
            coordinator.register_host(info)
        if n_hosts:
            coordinator.place_experts()
        servicer = CoordinatorServicer(coordinator)
        control = ControlServer(
            lambda server: coordinator_pb2_grpc.add_CoordinatorServicer_to_server(servicer, server)
        )
        stack.callback(control.close)

        def jobs(n: int) -> list[WorkerJob]:
            job = WorkerJob(
                rank=0,
                workers=n,
                config=config.to_dict(),
                corpus=corpus,
                start=start,
                output=output,
                coordinator=control.address,
                meeting=workers.meeting(output),
            )
            return [replace(job, rank=rank) for rank in range(n)]

        output.mkdir(parents=True, exist_ok=True)
        if lose_worker is not None:
            some = jobs(n_workers)
            found = workers.run([*some[:-1], replace(some[-1], end=lose_worker)])
            assert isinstance(found[-1], EOFError), found
            assert all(isinstance(one, WorkersLost) for one in found[:-1]), found
            n_workers = go_on_with or n_workers
        some = jobs(n_workers)
        found = workers.run([*some[:-1], replace(some[-1], cut=cut_worker)])
        for one in found:
            if isinstance(one, BaseException):
                raise one
        shares = [one for one in found if isinstance(one, WorkerResult)]
        outcome = RunOutcome(trunk=shares[0].trunk, metrics=read_metrics(output / METRICS_FILE))
        outcome.experts = {k: v for host in hosts for k, v in weights_of(host).items()}
        outcome.losses = [line["main_loss"] for line in outcome.metrics]
        return outcome, shares, list(steps.pauses)


__all__ = ["train_sharded"]
