"""Whether a cluster has room for expert hosts: free resources are counted by node."""

from __future__ import annotations

import socket

import pytest
import ray

from cluster.config import ClusterConfig
from jobs.fleet.room import lacking, nodes_to_take, resources_of_a_host, unreachable

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


@pytest.mark.parametrize(
    ("hosts", "free", "there", "taken"),
    [
        (3, {"a": 4.0, "b": 2.0, "c": 2.0}, [], ["a", "b", "c"]),
        (1, {"a": 9.0, "b": 1.0}, ["a"], ["b"]),
        (1, {"a": 9.0, "b": 0.5}, ["a"], ["a"]),
        (3, {"a": 1.0, "b": 2.0}, ["b", "b"], ["a", "b", "b"]),
        (2, {"a": 1.0}, ["", ""], ["a", ""]),
        (1, {}, ["a"], [""]),
    ],
    ids=["spread", "fewest-hosts", "room-first", "room-is-used-up", "too-little-room", "no-nodes"],
)
def test_hosts_go_to_the_nodes_with_the_fewest(
    hosts: int, free: dict[str, float], there: list[str], taken: list[str]
) -> None:
    nodes = {node: {"CPU": cpus} for node, cpus in free.items()}
    assert nodes_to_take(hosts, {"CPU": 1.0}, nodes, there) == taken


def test_hosts_that_reserve_nothing_go_to_the_nodes_with_the_fewest() -> None:
    assert nodes_to_take(3, {}, {"a": {}, "b": {"CPU": 2.0}}, ["a"]) == ["b", "a", "b"]


def test_a_node_is_silent_whose_port_is_closed_or_that_ray_has_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_port, socket.socket() as closed_port:
        closed_port.bind(("127.0.0.1", 0))  # taken, and nobody listens
        nodes = [
            {"NodeID": id, "Alive": alive, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for id, alive, port in (
                ("here", True, open_port.getsockname()[1]),
                ("lost", True, closed_port.getsockname()[1]),
                ("given-up", False, open_port.getsockname()[1]),
            )
        ]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        assert unreachable(["here", "lost", "given-up", "unknown"]) == {"lost", "given-up", "unknown"}
