"""Whether a cluster has room for expert hosts: free resources are counted by node."""

from __future__ import annotations

import pytest

from cluster.config import ClusterConfig
from jobs.fleet.room import lacking, resources_of_a_host

ASKED = {"CPU": 2.0, "accelerator": 1.0}


@pytest.mark.parametrize(
    ("hosts", "asked", "free", "room"),
    [
        (3, {"CPU": 1.0}, [{"CPU": 1.0}, {"CPU": 2.9}], None),
        (3, {"CPU": 1.5}, [{"CPU": 1.4}, {"CPU": 3.1}], 2),
        (1, {"CPU": 2.0}, [{"CPU": 1.0}, {"CPU": 1.0}], 0),
        (1, {"CPU": 0.1}, [{"CPU": 0.3 - 0.2}], None),
        (2, ASKED, [{"CPU": 8.0, "accelerator": 1.0}, {"CPU": 8.0}], 1),
        (1, {"CPU": 1.0}, [], 0),
        (9, {}, [], None),
    ],
)
def test_hosts_fit_on_single_nodes(
    hosts: int, asked: dict[str, float], free: list[dict[str, float]], room: int | None
) -> None:
    said = lacking(hosts, asked, free)
    if room is None:
        assert said == ""
    else:
        assert f"room for {room}:" in said


def test_what_is_missing_is_named_with_its_field() -> None:
    cluster = ClusterConfig(cpus_per_host=2, host_resources={"accelerator": 1})
    said = lacking(2, resources_of_a_host(cluster), [{"CPU": 0.5}])
    assert said.startswith("2 expert hosts wait to be started")
    assert "2 CPU (cluster.cpus_per_host), 1 accelerator (cluster.host_resources)" in said
    assert "at most 0.5 CPU, 0 accelerator free" in said
