"""Ray's autoscaler adds nodes for the expert hosts that are wanted and removes nodes without hosts."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from actors.rpc.admin_client import AdminClient
from support.commands.serve import running, save_model, tiny_model
from support.commands.streams import StreamLoad, disturbed, greedy_requests
from support.waiting import wait_until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    # Ray's own cluster helper leaves its log files and pipes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
RESOURCE = "raymoe_expert_host"
STREAMS, TOKENS = 8, 60


NODE = {"resources": {"CPU": 0, RESOURCE: 1}, "node_config": {}, "min_workers": 0, "max_workers": 4}
CONFIG: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 4,
    "provider": {
        "type": "external",  # by the class's own name: the type's defaults are not in Ray's wheel
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,  # all nodes have this machine's
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    },
    "available_node_types": {
        "expert": NODE,
        "ray.head.default": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
    "auth": {},
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
}


class FakeNodes:
    """A head with Ray's autoscaler, whose nodes are processes.

    Ray's own helper of this kind ends the processes of every other cluster of the machine.
    """

    def __enter__(self) -> str:
        """The cluster's address."""
        self.folder = tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = f"{ray.util.get_node_ip_address()}:{port}"
        nodes = {**CONFIG, "provider": {**CONFIG["provider"], "gcs_address": address}}
        config = Path(self.folder.name) / "nodes.json"
        config.write_text(json.dumps(nodes), encoding="utf-8")
        options = (f"--autoscaling-config={config}", "--num-cpus=4", f"--port={port}", "--block")
        self.head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *options],
            env={
                **os.environ,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def listens() -> bool:
            assert self.head.poll() is None, "the cluster does not come up"
            socket.create_connection((ray.util.get_node_ip_address(), port), 1).close()
            return True

        wait_until(listens, every=0.2, ignoring=OSError)
        return address

    def __exit__(self, *_: object) -> None:
        with suppress(psutil.NoSuchProcess):
            head = psutil.Process(self.head.pid)
            for process in (*head.children(recursive=True), head):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.head.wait(30)
        self.folder.cleanup()


def expert_nodes(address: str) -> set[str]:
    """Ids of the live nodes that offer room for expert hosts."""
    with ray.init(address=address, log_to_driver=False, logging_level="error"):
        return {node["NodeID"] for node in ray.nodes() if node["Alive"] and RESOURCE in node["Resources"]}


def wait_for_nodes(address: str, count: int) -> set[str]:

    def so_many() -> set[str] | None:
        found = expert_nodes(address)
        return found if len(found) == count else None

    found = wait_until(so_many, seconds=180.0, every=1.0, what=lambda: expert_nodes(address))
    assert found is not None
    return found


def test_nodes_follow_the_scale_under_traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This process, in which Ray's library is loaded already, has no token.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with FakeNodes() as address:
        follow(address, tmp_path)


def follow(cluster: str, tmp_path: Path) -> None:
    directory = save_model(tiny_model(), tmp_path / "tiny")
    settings = {
        "cluster.expert_hosts": 1,
        "cluster.cpus_per_host": 0,
        "cluster.host_resources": f"{{{RESOURCE}: 1}}",
        "serving.cpus_per_replica": 0.5,
    }
    options = [option for name, value in settings.items() for option in ("--set", f"{name}={value}")]
    requests = greedy_requests(STREAMS, TOKENS)
    address = ("--address", cluster)
    with running(tiny_model(), directory, tmp_path / "serve.log", *options, *address) as server:
        assert len(wait_for_nodes(server.ray, 1)) == 1
        calm = asyncio.run(StreamLoad(server, requests).run())
        admin = AdminClient(f"grpc:{server.coordinator}")
        for target in (4, 1):
            began = time.monotonic()
            load = asyncio.run(
                disturbed(
                    StreamLoad(server, requests), STREAMS * 5, lambda n=target: admin.scale(n, timeout=240.0)
                )  # type: ignore[misc]
            )
            assert load.told == calm
            scaled = time.monotonic() - began
            nodes = wait_for_nodes(server.ray, target)
            hosts = admin.status()["hosts"]
            assert {host["node"] for host in hosts} == nodes
            print(
                f"to {target} hosts in {scaled:.1f} s, {target} expert nodes after "
                f"{time.monotonic() - began:.1f} s: longest gap {load.gap:.2f} s"
            )
        admin.close()
