"""Choices among replicas are complete, even, and as local as the primaries."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import Site, plan
from cluster.replica_choices import MOST_CHOICES, replica_choices
from cluster.topology import Holders

HOSTS = 8
ROWS: st.SearchStrategy[Holders] = st.integers(1, 9).flatmap(
    lambda n_experts: st.lists(
        st.lists(
            st.lists(st.integers(0, HOSTS - 1), unique=True, max_size=HOSTS).map(tuple),
            min_size=n_experts,
            max_size=n_experts,
        ).map(tuple),
        min_size=1,
        max_size=3,
    ).map(tuple)
)


@settings(deadline=None)
@given(ROWS)
def test_every_choice_is_complete_and_load_splits_as_evenly_as_it_can(holders: Holders) -> None:
    table = replica_choices(holders, HOSTS)
    n_choices = len(table)
    assert table.shape == (n_choices, len(holders), len(holders[0]))
    assert 1 <= n_choices <= MOST_CHOICES
    assert (n_choices == 1) == all(len(hosts) < 2 for row in holders for hosts in row)
    for layer, row in enumerate(holders):
        for expert, hosts in enumerate(row):
            chosen = table[:, layer, expert].tolist()
            if not hosts:
                assert chosen == [-1] * n_choices
                continue
            assert set(chosen) <= set(hosts)
            assert chosen[0] == hosts[0], "choice 0 is not the primaries"
            times = [Counter(chosen)[host] for host in hosts]
            assert max(times) - min(times) <= 1


@given(st.integers(1, 4), st.integers(0, 6))
def test_numbers_of_replicas_that_divide_12_split_evenly_together(most: int, more: int) -> None:
    holders = (tuple(tuple(range(count)) for count in (*range(1, most + 1), *[1] * more)),)
    table = replica_choices(holders, HOSTS)
    for expert, hosts in enumerate(holders[0]):
        assert set(Counter(table[:, 0, expert].tolist()).values()) == {len(table) // len(hosts)}


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 4), st.integers(2, 9))
def test_groups_stay_together_in_every_choice(replicas: int, n_group: int, size: int, n_sites: int) -> None:
    n_sites = min(n_sites, n_group * size)
    sites = [Site(f"host-{at}", f"node-{at % 2}") for at in range(n_sites)]
    placement = plan(sites, n_layers=2, n_experts=n_group * size, n_group=n_group, replicas=replicas)
    table = replica_choices(placement.indices(), n_sites).reshape(-1, 2, n_group, size)
    for layer in range(2):
        for group in range(n_group):
            hosts = [len(set(choice[layer, group].tolist())) for choice in table]
            if n_sites <= n_group:
                assert hosts == [1] * len(table)
            elif n_sites % (2 * n_group) == 0:  # all hosts are alike, and so are both nodes
                assert max(hosts) <= hosts[0], "a choice scatters a group more than its primaries do"


def test_experts_with_more_replicas_follow_those_of_the_same_primary() -> None:
    table = replica_choices((((0, 1), (0, 1, 2), (0, 1)),), 3)
    assert len(table) == 6
    together = np.mean([len(set(choice[0].tolist())) == 1 for choice in table])
    assert together == pytest.approx(4 / 6), "the third replica takes a third, the rest is together"


def test_a_host_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="name host 3, but there are 3 hosts"):
        replica_choices((((3,),),), 3)
