"""Expert hosts in processes of their own, without Ray, and a lane to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from actors.lane import Lane
from actors.router import Router
from cluster.config import ClusterConfig
from cluster.topology import RoutingTable
from jobs.bench.contenders import host_process, until_closed
from jobs.hosts import connector, experts_of, host_threads, placement
from model.config import ModelConfig


@contextmanager
def expert_lane(
    model: ModelConfig, cluster: ClusterConfig, *, seed: int = 0, directory: Path | None = None
) -> Iterator[Lane]:
    """A lane to the hosts of a cluster.

    Args:
        seed: of random weights.
        directory: of weights in Hugging Face's format, in place of random ones.
    """
    values = {
        "model": model.to_hf(),
        "cluster": cluster.model_dump(),
        "seed": seed,
        "directory": None if directory is None else str(directory),
    }
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(host_process(_serve, values, index)) for index in range(cluster.expert_hosts)
        ]
        table = RoutingTable(epoch=0, hosts=tuple(hosts), holders=placement(model, len(hosts)))
        router = Router("bench", "bench", model, table, connector(cluster), timeout=cluster.call_timeout)
        stack.callback(router.close)
        yield router.lane(0)


def _serve(values: dict[str, Any], index: int, pipe: Connection) -> None:
    from actors.expert_host import ExpertHost
    from actors.serving import ExpertHostServer
    from model.sources import PretrainedSource, RandomSource, WeightSource

    model, cluster = ModelConfig.from_hf(values["model"]), ClusterConfig(**values["cluster"])
    source: WeightSource = RandomSource(model, values["seed"])
    if values["directory"] is not None:
        source = PretrainedSource(Path(values["directory"]))
    host = ExpertHost(
        f"host-{index}", model, experts_of(model, cluster, index), source, threads=host_threads(cluster)
    )
    until_closed(ExpertHostServer(host), pipe)


__all__ = ["expert_lane"]
