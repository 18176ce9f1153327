"""The coordinator's measurements of hosts under load, its scaling, and its detection of dead hosts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.coordinator.failure_detector import FailureDetector
from actors.coordinator.host_roster import HostRoster
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.routing_tables import PublishedWeights
from actors.coordinator.scaling import Autoscaler, Rebalancer
from actors.coordinator.transfer_plan import PlacementSpec
from cluster.config import AutoscalingSettings
from cluster.membership import Membership
from cluster.policy import NoDecision, RebalanceDecision, ScaleDecision, total_balancedness
from cluster.topology import HostInfo
from errors import ChannelError, ResourceError
from support.elastic_simulation import EXPERTS, LAYERS, Inline
from support.fakes.fake_hosts import FakeHost, zeros

SETTINGS = AutoscalingSettings(
    min_hosts=1, max_hosts=4, target_utilization=0.5, upscale_delay=2, downscale_delay=4, cooldown=3
)


class ScalingCluster:
    """Serving hosts, a clock, and the autoscaler and health check over them."""

    def __init__(self, hosts: int = 2, *, redundant: int = 0, threshold: float | None = 0.8) -> None:
        self.now = 100.0
        self.world: dict[str, FakeHost] = {}
        self.membership = Membership(wanted=hosts, most=EXPERTS)
        self.roster = HostRoster(
            self.membership,
            PublishedWeights(),
            lambda info: self.world[info.id],
            clock=lambda: self.now,
            pool=Inline(),
        )
        spec = PlacementSpec(layers=LAYERS, n_experts=EXPERTS, n_group=4, redundant=redundant)
        self.placements = PlacementController(self.roster, spec)
        for at in range(hosts):
            self.add(at)
        self.placements.begin("weights", "directory")
        self.autoscaler = Autoscaler(self.placements, SETTINGS, clock=lambda: self.now)
        self.rebalancer = Rebalancer(self.placements, threshold, least=10)

    def add(self, at: int) -> None:
        host = FakeHost(f"host-{at}", self.world)
        host.counted = zeros(len(LAYERS), EXPERTS)
        self.roster.register(HostInfo(id=host.id, node=f"node-{at}"))

    def settle(self) -> None:
        why = self.placements.due()
        if why is not None:
            self.placements.reshape(why)
        self.placements.due()

    def second(self, share: float, in_flight: int = 0) -> NoDecision | ScaleDecision:
        """Advance by a second, in which every host was busy for this share."""
        self.now += 1.0
        for host in self.world.values():
            host.busy_seconds += share
            host.in_flight = in_flight
        return self.autoscaler.look()

    def rows(self, loads: torch.Tensor) -> None:
        """Distribute each expert's rows evenly over its holders."""
        current = self.placements.published.current
        assert current is not None
        for layer, row in enumerate(current.placement.holders):
            for expert, ids in enumerate(row):
                for id in ids:
                    counted = self.world[id].counted
                    assert counted is not None
                    counted[layer, expert] += int(loads[layer, expert]) // len(ids)


def skewed() -> torch.Tensor:
    """Loads whose hot experts are on one host in the first placement."""
    loads = torch.full((len(LAYERS), EXPERTS), 10, dtype=torch.int64)
    loads[:, : EXPERTS // 2] = 200
    return loads


def test_load_brings_hosts_and_its_end_takes_them_away() -> None:
    cluster = ScalingCluster(2)
    assert isinstance(cluster.second(0.9), NoDecision)  # measured once
    assert isinstance(cluster.second(0.9), NoDecision)  # for too short a time
    decisions = [cluster.second(0.9) for _ in range(3)]
    (decision,) = [one for one in decisions if isinstance(one, ScaleDecision)]
    assert decision.target == 4
    assert cluster.membership.wanted == 4
    assert "autoscaled" in [event.kind for event in cluster.membership.events]
    assert isinstance(cluster.second(0.9), NoDecision)
    assert "is under way" in cluster.autoscaler.last.why
    cluster.add(2)
    cluster.add(3)
    cluster.settle()
    looks = [cluster.second(0.05) for _ in range(12)]
    targets = [one.target for one in looks if isinstance(one, ScaleDecision)]
    assert targets == [1]
    cluster.settle()
    assert set(cluster.membership.members) == {"host-0"}


def test_even_load_changes_nothing() -> None:
    cluster = ScalingCluster(2)
    assert all(isinstance(cluster.second(0.5), NoDecision) for _ in range(20))
    assert cluster.membership.scaling is None


def test_a_scale_that_fails_is_noted_and_left_for_the_cooldown() -> None:
    cluster = ScalingCluster(2)
    for _ in range(4):
        cluster.second(0.9)
    cluster.roster.orders(starting=0, failed={"host-2": "no CPUs"}, stopped=[])
    assert cluster.membership.wanted == 2
    looks = [cluster.second(0.9) for _ in range(2)]
    assert all(isinstance(one, NoDecision) for one in looks), "at once again"
    assert any(isinstance(cluster.second(0.9), ScaleDecision) for _ in range(8))


def test_a_host_that_does_not_answer_is_left_out_of_the_measure() -> None:
    cluster = ScalingCluster(2)
    cluster.world["host-1"].dead = True
    for _ in range(3):
        cluster.second(0.9)
    assert isinstance(cluster.autoscaler.last, NoDecision | ScaleDecision)
    assert cluster.autoscaler._before[1].keys() == {"host-0"}


def test_experts_are_placed_by_load_when_hosts_are_out_of_balance() -> None:
    cluster = ScalingCluster(2)
    cluster.rebalancer.look()
    assert isinstance(cluster.rebalancer.look(), NoDecision)
    before = cluster.placements.published.current
    assert before is not None
    cluster.rows(skewed())
    decision = cluster.rebalancer.look()
    assert isinstance(decision, RebalanceDecision)
    assert cluster.rebalancer.balancedness == pytest.approx(0.525)
    assert cluster.placements.due() == decision.why
    cluster.settle()
    after = cluster.placements.published.current
    assert after is not None
    assert after.epoch > before.epoch
    assert total_balancedness(after.placement, skewed()) > 0.99
    assert sum(host.read for host in cluster.world.values()) == EXPERTS * len(LAYERS), "read at the beginning"
    assert isinstance(cluster.rebalancer.look(), NoDecision)  # what was computed before does not count
    cluster.rows(skewed())
    assert isinstance(cluster.rebalancer.look(), NoDecision)
    assert cluster.rebalancer.balancedness is not None
    assert cluster.rebalancer.balancedness > 0.99
    assert cluster.placements.due() is None


def test_hosts_that_join_later_are_filled_by_load_too() -> None:
    cluster = ScalingCluster(2)
    cluster.rebalancer.look()
    cluster.rows(skewed())
    cluster.rebalancer.look()
    cluster.settle()
    cluster.roster.scale(3)
    cluster.add(2)
    cluster.settle()
    current = cluster.placements.published.current
    assert current is not None
    assert total_balancedness(current.placement, skewed()) > 0.9


def test_redundant_experts_go_to_the_hot_ones_once_loads_are_known() -> None:
    cluster = ScalingCluster(3, redundant=2, threshold=None)
    cluster.rebalancer.look()
    loads = torch.full((len(LAYERS), EXPERTS), 10, dtype=torch.int64)
    loads[:, 5] = 1000
    cluster.rows(loads)
    assert isinstance(cluster.rebalancer.look(), RebalanceDecision)
    cluster.settle()
    current = cluster.placements.published.current
    assert current is not None
    assert all(len(row[5]) > 1 for row in current.placement.holders)
    cluster.rebalancer.look()
    cluster.rows(loads)
    assert isinstance(cluster.rebalancer.look(), NoDecision)
    for id, rows in current.placement.holding().items():
        assert [cluster.world[id].held[current.epoch][layer] for layer in LAYERS] == list(rows)


def test_other_weights_that_come_into_use_are_counted() -> None:
    cluster = ScalingCluster(2)
    epoch = cluster.placements.load("other", "new")
    assert cluster.placements.reloads == 0
    cluster.placements.publish(epoch)
    cluster.placements.publish(epoch)
    assert cluster.placements.reloads == 1
    assert cluster.membership.events[-1].text == "the weights new in place of weights"


def test_few_rows_say_nothing() -> None:
    cluster = ScalingCluster(2)
    cluster.rebalancer.look()
    cluster.rows(torch.eye(len(LAYERS), EXPERTS).long())
    decision = cluster.rebalancer.look()
    assert isinstance(decision, NoDecision)
    assert "too few rows" in decision.why
    assert cluster.rebalancer.balancedness is None


def test_a_host_that_hangs_is_dead_after_its_patience_and_one_that_hangs_up_at_once() -> None:
    cluster = ScalingCluster(3)
    health = FailureDetector(cluster.roster, 4.0, clock=lambda: cluster.now)
    health.look()
    cluster.world["host-1"].hung = True
    cluster.world["host-2"].dead = True
    cluster.now += health.pause
    health.look()
    assert set(cluster.membership.members) == {"host-0", "host-1"}
    for _ in range(3):
        cluster.now += health.pause
        health.look()
    assert "host-1" in cluster.membership.members, "4 s are not over"
    cluster.now += health.pause
    health.look()
    assert set(cluster.membership.members) == {"host-0"}
    assert cluster.world["host-1"].closed.is_set()
    assert "silent for 4 s" in cluster.membership.events[-1].text
    assert "cluster.dead_after" in cluster.membership.events[-1].text


@pytest.mark.parametrize(("how", "named"), [("hung", True), ("dead", False)])
def test_the_reason_of_a_death_names_the_patience_only_where_that_is_the_reason(
    how: str, named: bool
) -> None:
    cluster = ScalingCluster(2)
    setattr(cluster.world["host-1"], how, True)
    cluster.roster.suspect("host-1", "a router lost a call")
    (died,) = [event.text for event in cluster.membership.events if event.kind == "died"]
    assert died.startswith("expert host host-1: a router lost a call")
    assert ("cluster.dead_after" in died) is named


def test_a_death_that_is_found_twice_is_told_once() -> None:
    """A host is asked again before it is declared dead, and mostly gives the same error."""
    cluster = ScalingCluster(2)
    cluster.world["host-1"].dead = True
    FailureDetector(cluster.roster, 4.0, clock=lambda: cluster.now).look()
    (died,) = [event.text for event in cluster.membership.events if event.kind == "died"]
    assert died == "expert host host-1: expert host host-1 cannot be reached"


def test_an_automatic_change_does_not_take_the_place_of_a_requested_one() -> None:
    cluster = ScalingCluster(2)
    cluster.roster.scale(3)
    with pytest.raises(ResourceError, match="under way"):
        cluster.roster.scale(4, why="the hosts are busy")
    cluster.roster.scale(1)
    assert cluster.membership.wanted == 1


def test_who_was_away_itself_takes_nobody_for_dead() -> None:
    cluster = ScalingCluster(2)
    health = FailureDetector(cluster.roster, 4.0, clock=lambda: cluster.now)
    health.look()
    slow = cluster.world["host-1"]
    slow.hung = True  # as if the machine had been stopped
    cluster.now += 60.0
    health.look()
    assert len(cluster.membership.members) == 2
    slow.hung = False
    cluster.now += health.pause
    health.look()
    cluster.now += health.pause
    health.look()
    assert len(cluster.membership.members) == 2


def test_loads_of_hosts_that_die_are_left_out() -> None:
    cluster = ScalingCluster(2)
    cluster.rebalancer.look()
    cluster.rows(skewed())
    cluster.world["host-1"].dead = True
    cluster.rebalancer.look()
    with pytest.raises(ChannelError):
        cluster.world["host-1"].loads()
    assert np.isfinite(cluster.rebalancer.balancedness or 0.0)
