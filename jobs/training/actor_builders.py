"""Builds the expert hosts and the coordinator of a training run, in their own processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from actors.coordinator.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.training_steps import Beginning, TrainingSteps
from actors.host import ExpertHost, HostResources, HostSettings, InitialExperts
from actors.host.checkpoint_part import MomentSource
from actors.messages.coordinator_state import CoordinatorState
from actors.messages.host_control import HostControl
from actors.messages.transfer_orders import Peer
from actors.rpc.host_client import HostClient
from cluster.topology import HostInfo
from jobs.checkpoints.checkpoint_store import CheckpointStore, read_state
from jobs.config.device_and_dtype import compute_device, resolve_dtype
from jobs.config.run_config import RunConfig
from jobs.fleet.expert_hosts import host_threads, placement_spec
from jobs.training.run_settings import optimizer_settings, timeline, training_plan
from jobs.training.run_start import RunStart, moment_source, weight_source
from model.checkpoints.pretrained import WeightSource
from model.checkpoints.sources import gate_biases


def build_host(
    config: RunConfig,
    start: RunStart,
    id: str,
    *,
    connect: Callable[[HostInfo], Peer] = HostClient,
    output: Path | None = None,
) -> ExpertHost:
    """An expert host without experts yet.

    Args:
        config: The run's configuration.
        start: Where the run starts.
        id: Name of the host.
        connect: Opens a client of another host.
        output: The run's directory, for a timeline.
    """

    def open_source(directory: str) -> WeightSource:
        return weight_source(config, start.at(directory))

    def open_moments(directory: str) -> MomentSource:
        source = moment_source(start.at(directory))
        assert source is not None
        return source

    return ExpertHost(
        id,
        config.model,
        InitialExperts(source=weight_source(config, start), step=start.step),
        settings=HostSettings(
            optimizer=optimizer_settings(config),
            dtype=resolve_dtype(config),
            threads=host_threads(config.cluster),
            device=compute_device(config.cluster.gpus_per_host, "cluster.gpus_per_host"),
        ),
        resources=HostResources(open_source=open_source, open_moments=open_moments, connect=connect),
        timeline=None if output is None else timeline(config, start, id, output),
    )


def build_coordinator(
    config: RunConfig,
    start: RunStart,
    output: Path,
    state: CoordinatorState | None = None,
    *,
    control: Callable[[HostInfo], HostControl] | None = None,
) -> Coordinator:
    """The coordinator of a run.

    Args:
        config: The run's configuration.
        start: Where the run starts.
        output: The run's directory.
        state: The state of the coordinator before this one.
        control: Opens a client of a host; None does so over gRPC.
    """
    model, cluster = config.model, config.cluster

    def beginning() -> Beginning:
        """The latest checkpoint of this run, or the weights that it started with."""
        latest = start
        for checkpoint in reversed(CheckpointStore(output / "checkpoints").complete()):
            step = read_state(checkpoint).step
            if step >= start.step:
                latest = RunStart(run=start.run, step=step, weights=checkpoint, moments=True)
            break
        return Beginning(
            directory="" if latest is start else str(latest.weights),
            step=latest.step,
            moments=latest.moments,
            bias=gate_biases(weight_source(config, latest), model),
        )

    def steps(placements: PlacementController) -> TrainingSteps:
        return TrainingSteps(
            training_plan(config),
            (len(model.moe_layers), model.n_routed_experts),
            placements if cluster.expert_hosts else None,
            beginning=beginning,
            step=start.step,
            bias=gate_biases(weight_source(config, start), model),
            note=placements.roster.note,
        )

    return Coordinator(
        placement_spec(model, cluster),
        HostPolicy(
            hosts=cluster.expert_hosts,
            dead_after=cluster.dead_after,
            rebalance_below=cluster.rebalance_below,
            channel=cluster.channel,
        ),
        control=control or partial(HostClient, timeout=cluster.call_timeout),
        initial=InitialWeights(moments=start.moments, step=start.step),
        steps=steps,
        state=state,
    )


__all__ = ["build_coordinator", "build_host"]
