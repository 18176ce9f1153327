"""Expert hosts in their own processes, without Ray, and an engine's lanes to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from actors.router import Router, RouterSettings
from actors.router.engine_lanes import EngineLanes
from benchmarks.contenders import host_process, until_closed
from cluster.config import ClusterConfig
from cluster.topology import RoutingTable
from jobs.config.device_and_dtype import compute_device
from jobs.fleet.expert_hosts import connector, experts_of, host_threads, placement
from model.config import ModelConfig


@contextmanager
def expert_lanes(
    model: ModelConfig,
    cluster: ClusterConfig,
    *,
    seed: int = 0,
    directory: Path | None = None,
    cores: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Iterator[EngineLanes]:
    """Lanes to the hosts of a cluster.

    Args:
        seed: Seed of random weights.
        directory: Directory with weights in Hugging Face's format, in place of random ones.
        cores: Cores that the hosts run on; if empty, all.
        dtype: The type that the hosts compute in.
    """
    values = {
        "model": model.to_hf(),
        "cluster": cluster.model_dump(),
        "seed": seed,
        "cores": list(cores),
        "dtype": dtype,
        "directory": None if directory is None else str(directory),
    }
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(host_process(_serve, values, index)) for index in range(cluster.expert_hosts)
        ]
        table = RoutingTable(epoch=0, hosts=tuple(hosts), holders=placement(model, len(hosts)))
        router = Router(
            "bench",
            "bench",
            model,
            table,
            connector(cluster, compute_device(cluster.gpus_per_host, "cluster.gpus_per_host")),
            RouterSettings(lanes=2, timeout=cluster.call_timeout),
        )
        stack.callback(router.close)
        yield EngineLanes(router)


def _serve(values: dict[str, Any], index: int, pipe: Connection) -> None:
    from actors.host import ExpertHost, HostSettings, InitialExperts
    from actors.host.host_server import ExpertHostServer
    from model.checkpoints.sources import PretrainedSource, RandomSource
    from model.weight_source import WeightSource

    if values["cores"]:
        os.sched_setaffinity(0, values["cores"])
    model, cluster = ModelConfig.from_hf(values["model"]), ClusterConfig(**values["cluster"])
    dtype = values["dtype"]
    source: WeightSource = RandomSource(model, values["seed"], dtype)
    if values["directory"] is not None:
        source = PretrainedSource(Path(values["directory"]))
    host = ExpertHost(
        f"host-{index}",
        model,
        InitialExperts(source=source, experts=experts_of(model, cluster, index)),
        settings=HostSettings(
            threads=host_threads(cluster),
            dtype=dtype,
            device=compute_device(cluster.gpus_per_host, "cluster.gpus_per_host"),
        ),
    )
    until_closed(ExpertHostServer(host), pipe)


__all__ = ["expert_lanes"]
