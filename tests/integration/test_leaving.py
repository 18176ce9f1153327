"""`raymoe drain --node` on three nodes, and expert hosts on those that offer a custom resource."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from actors.rpc.admin_client import AdminClient
from errors import ConfigError
from jobs.tools.node_drain import leave
from support.commands.serve import running, save_model, tiny_model

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(600),
    # Ray's own cluster helper leaves its log files and pipes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FREE_PORTS = {"dashboard_agent_listen_port": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node that takes no expert hosts, and two nodes without CPUs that do."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **FREE_PORTS}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=0, resources={"expert_host": 2}, **FREE_PORTS)
        yield cluster
    finally:
        cluster.shutdown()


def test_hosts_are_where_their_resource_is_and_leave_a_node(cluster: Cluster, tmp_path: Path) -> None:
    directory = save_model(tiny_model(), tmp_path / "tiny")
    options = ["cluster.expert_hosts=2", "cluster.cpus_per_host=0", "cluster.host_resources.expert_host=1"]
    given = [part for option in options for part in ("--set", option)]
    offering = {node.node_id for node in cluster.list_all_nodes() if node is not cluster.head_node}
    with running(
        tiny_model(), directory, tmp_path / "serve.log", *given, "--address", cluster.address
    ) as server:
        admin = AdminClient(f"grpc:{server.coordinator}")
        before = {host["id"]: host["node"] for host in admin.status()["hosts"]}
        assert len(before) == 2 and set(before.values()) <= offering
        node = before["host-0"]
        done = leave(node, address=cluster.address, timeout=60)
        assert done["drained"] == [id for id, at in before.items() if at == node]
        after = {host["id"]: host["node"] for host in admin.status()["hosts"]}
        assert len(after) == 2 and set(after.values()) == offering - {node}
        with pytest.raises(ConfigError, match="head node and holds the pool and interface of raymoe"):
            leave(cluster.head_node.node_id, address=cluster.address, timeout=5)
        with pytest.raises(ConfigError, match="no Ray node"):
            leave("ab" * 28, address=cluster.address, timeout=5)
        admin.close()
