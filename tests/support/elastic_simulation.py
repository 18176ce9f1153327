"""A simulated cluster of fake hosts with a simulated clock and no threads: starts take time and may fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from actors.coordinator.host_roster import HostRoster
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.routing_tables import PublishedWeights
from actors.coordinator.transfer_plan import PlacementSpec, arrivals
from actors.messages.transfer_orders import Assembly
from cluster.membership import Membership, Stage
from cluster.placement import Placement
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, RaymoeError
from support.fakes.fake_hosts import FakeHost

DEAD_AFTER = 3.0
LAYERS, EXPERTS, GROUPS = (1, 2), 12, 4


class Inline(Executor):
    """An executor that does work when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class SimulatedHost(FakeHost):
    """A fake host that never waits, and fails if it reads from disk what a live host holds."""

    def _up(self) -> None:
        if self.hung:
            raise ChannelTimeout(f"expert host {self.id} did not answer in time")
        if self.dead:
            raise ChannelError(f"expert host {self.id} cannot be reached")

    def _get(self, order: Assembly, layer: int, expert: int) -> None:
        before = self.read
        super()._get(order, layer, expert)
        if self.read > before and order.base is not None:
            having = [o.id for o in self.world.values() if not o.dead and not o.hung]
            having = [id for id in having if self.world[id].has(order, layer, expert)]
            assert not having, f"expert {expert} of layer {layer} was read, though {having} had it"


class Simulation:
    """The work of a fleet and of a coordinator's threads, tick by tick.

    Attributes:
        fail_next: Number of next starts that fail.
        die_next: Number of next hosts that die in the middle of their first assembly.
        moved, least: Experts that moved, and the least that had to, in undisturbed moves.
    """

    def __init__(self, seed: int, *, replicas: int, hosts: int = 2, nodes: int = 3) -> None:
        self.random = random.Random(seed)
        self.nodes = nodes
        self.now = 1000.0
        self.world: dict[str, FakeHost] = {}
        self.starting: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.stopped: list[str] = []
        self.fail_next = self.die_next = 0
        self.moved = self.least = 0
        self.started = 0
        self.lost: list[str] = []
        self.serial, self.epoch = -1, -1
        self.membership = Membership(wanted=hosts, most=EXPERTS)
        self.roster = HostRoster(
            self.membership,
            PublishedWeights(),
            lambda info: self.world[info.id],
            on_lost=lambda id, why: self.lost.append(id),
            patience=1.0,
            clock=lambda: self.now,
            pool=Inline(),
        )
        spec = PlacementSpec(layers=LAYERS, n_experts=EXPERTS, n_group=GROUPS, replicas=replicas)
        self.placements = PlacementController(self.roster, spec)
        for _ in range(hosts):
            self._start()
        while len(self.membership.members) < hosts:
            self._fleet()
            self.now += 0.5
        self.placements.begin("weights", "directory")

    # --- what happens

    def alive(self) -> list[str]:
        return [id for id, host in self.world.items() if not host.dead and not host.hung]

    def tick(self) -> None:
        """Advance by half a second."""
        self.now += 0.5
        self.roster.ping_all(DEAD_AFTER)
        for id in self.roster.silent(DEAD_AFTER):
            self.roster.lose(id, "silent")
        self._fleet()
        why = self.placements.due()
        if why is not None:
            before, deaths = self.placements.published.current, len(self.lost)
            assert before is not None
            try:
                self.placements.reshape(why)
            except RaymoeError:
                assert self.placements.published.current is not None
            else:
                after = self.placements.published.current
                if len(self.lost) == deaths and after is not None:
                    self._count(before.placement, after.placement)
        self.check()

    def settle(self) -> None:
        """Tick until no work is left."""
        for _ in range(400):
            self.tick()
            if self.settled():
                return
        raise AssertionError(f"the hosts come to no rest: {self.membership}")

    def settled(self) -> bool:
        members = self.membership.members
        scaling = self.membership.scaling
        return (
            len(members) == self.membership.wanted
            and set(self.alive()) == set(members)
            and not self.starting
            and all(member.stage is Stage.SERVING for member in members.values())
            and self.placements.due() is None
            and (scaling is None or scaling.ended is not None)
        )

    def _fleet(self) -> None:
        for id, ready in list(self.starting.items()):
            if self.now < ready:
                continue
            del self.starting[id]
            if self.fail_next:
                self.fail_next -= 1
                self.failed[id] = "no CPUs"
                continue
            host = SimulatedHost(id, self.world)
            if self.die_next:
                self.die_next -= 1
                host.on_assemble = lambda host=host: setattr(host, "dead", True)
            node = f"node-{self.random.randrange(self.nodes)}"
            self.roster.register(HostInfo(id=id, node=node))
        failed, stopped = dict(self.failed), list(self.stopped)
        orders, _ = self.roster.orders(starting=len(self.starting), failed=failed, stopped=stopped)
        self.failed, self.stopped = {}, []
        for id in orders.stop:
            self.world[id].dead = True
            self.stopped.append(id)
        for _ in range(orders.start):
            self._start()

    def _start(self) -> None:
        self.starting[f"host-{self.started}"] = self.now + self.random.choice([0.0, 0.5, 1.0, 3.0])
        self.started += 1

    def _count(self, before: Placement, after: Placement) -> None:
        old, new = before.holding(), after.holding()
        self.moved += arrivals(after, old)
        empty = ((),) * len(LAYERS)
        for id, rows in new.items():
            for row, had in zip(rows, old.get(id, empty), strict=True):
                self.least += max(0, len(row) - len(had))

    # --- what has to hold

    def check(self) -> None:
        """Check the invariants that hold at any moment."""
        table = self.placements.published.table()
        assert table is not None
        assert table.serial >= self.serial
        assert table.epoch >= self.epoch
        self.serial, self.epoch = table.serial, table.epoch
        for layer, row in zip(LAYERS, table.holders, strict=True):
            for expert, hosts in enumerate(row):
                assert len(set(hosts)) == len(hosts)
                for at in hosts:
                    held = self.world[table.hosts[at].id].held
                    assert expert in held[table.epoch].get(layer, ()), "the table names who does not hold it"

    def check_settled(self) -> None:
        """Check the invariants that hold when no work is left."""
        current, table = self.placements.published.current, self.placements.published.table()
        assert current is not None
        assert table is not None
        members = self.membership.members
        assert set(current.placement.sites) == set(members)
        node = {id: member.info.node for id, member in members.items()}
        copies = min(self.placements.spec.replicas, len(members))
        for row in current.placement.holders:
            for ids in row:
                assert len(ids) >= copies
                apart = len({node[id] for id in ids})
                assert copies < 2 or apart > 1 or len(set(node.values())) == 1, f"{ids} are on one node"
        if copies < 2 or len(set(node.values())) == 1:  # else few hosts on a node have to take more
            counts = [len(row) for rows in current.placement.holding().values() for row in rows]
            assert max(counts) - min(counts) <= EXPERTS // GROUPS
        for id in members:
            assert set(self.world[id].held) == {current.epoch}, "a host holds what is of no use"
        gone = [host for id, host in self.world.items() if id not in members]
        assert all(host.dead for host in gone), "a host was forgotten"
        assert all(host.closed.is_set() for host in gone), "a client was not closed"


__all__ = ["Simulation"]
