"""The placement without loads, nodes and replicas; tables as JSON; the configuration of a cluster."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.placement import plan_placement
from cluster.topology import Holders, HostInfo, RoutingTable, experts_held
from errors import ConfigError

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 36)).filter(
    lambda shape: shape[3] <= shape[1] * shape[2]
)


def only(holders: Holders) -> list[list[int]]:
    """The one holder of each expert."""
    return [[host for (host,) in row] for row in holders]


@given(SHAPES)
def test_every_expert_has_one_host_and_every_host_has_experts(shape: tuple[int, int, int, int]) -> None:
    n_layers, n_group, per_group, n_hosts = shape
    holders = plan_placement(n_layers, n_group * per_group, n_group, n_hosts)
    assert len(holders) == n_layers
    for row in holders:
        assert len(row) == n_group * per_group
        assert set(row) == {(host,) for host in range(n_hosts)}


@given(SHAPES)
def test_groups_stay_together(shape: tuple[int, int, int, int]) -> None:
    n_layers, n_group, per_group, n_hosts = shape
    for row in only(plan_placement(n_layers, n_group * per_group, n_group, n_hosts)):
        groups = [set(row[g * per_group : (g + 1) * per_group]) for g in range(n_group)]
        if n_hosts <= n_group:
            assert all(len(hosts) == 1 for hosts in groups)
            held = [sum(hosts == {host} for hosts in groups) for host in range(n_hosts)]
            assert max(held) - min(held) <= 1
        else:
            assert sum(len(hosts) for hosts in groups) == n_hosts, "a host holds experts of two groups"
            spread = [len(hosts) for hosts in groups]
            assert max(spread) - min(spread) <= 1
            for g, hosts in enumerate(groups):
                counts = [row[g * per_group : (g + 1) * per_group].count(host) for host in hosts]
                assert max(counts) - min(counts) <= 1


def test_the_larger_share_rotates_over_layers() -> None:
    holders = only(plan_placement(3, 4, 4, 3))
    assert [max(range(3), key=row.count) for row in holders] == [0, 1, 2]
    assert sorted(sum(row.count(host) for row in holders) for host in range(3)) == [4, 4, 4]


def test_an_even_placement_is_the_same_in_every_layer() -> None:
    assert only(plan_placement(2, 8, 4, 2)) == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


def test_more_hosts_than_experts_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.expert_hosts is 9.*only 8 routed experts"):
        plan_placement(1, 8, 4, 9)


def test_no_host_and_uneven_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 host"):
        plan_placement(1, 8, 4, 0)
    with pytest.raises(ConfigError, match=r"model\.n_routed_experts"):
        plan_placement(1, 9, 4, 2)


def test_experts_held_splits_the_experts() -> None:
    holders = plan_placement(2, 8, 4, 3)
    parts = [experts_held(holders, (3, 7), host) for host in range(3)]
    for layer in (3, 7):
        assert sorted(expert for part in parts for expert in part[layer]) == list(range(8))


def test_a_table_survives_json() -> None:
    host = HostInfo(id="host-0", node="n", pid=7, addresses={"grpc": "grpc:127.0.0.1:1"})
    table = RoutingTable(epoch=3, hosts=(host,), holders=(((0,), ()), ((0, 0), (0,))))
    assert RoutingTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_the_configuration_refuses_unknown_fields_and_negative_counts() -> None:
    with pytest.raises(ValueError, match="expert_host\n"):
        ClusterConfig.model_validate({"expert_host": 1})
    with pytest.raises(ValueError, match="expert_hosts"):
        ClusterConfig.model_validate({"expert_hosts": -1})
