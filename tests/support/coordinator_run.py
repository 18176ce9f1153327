"""A training run of a real coordinator and fake hosts; the test makes the workers' calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from actors.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.coordinator.common_snapshot import TRUNK
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.training_steps import Beginning, TrainingSteps
from actors.coordinator.transfer_plan import PlacementSpec
from actors.messages.steps import Resume, StepReport, TrainingPlan
from actors.messages.transfer_orders import Blob
from cluster.topology import HostInfo
from support.fakes.fake_hosts import FakeHost

L, E = 2, 4
PLAN = TrainingPlan(steps=10, workers=2, learning_rate=1e-2, warmup_steps=2, clip_norm=1.0)


class Run:
    """A coordinator with fake hosts that hold their experts."""

    def __init__(
        self,
        plan: TrainingPlan = PLAN,
        n_hosts: int = 2,
        *,
        dead_after: float = 5.0,
        beginning: Callable[[], Beginning] | None = None,
        step: int = 0,
        bias: Tensor | None = None,
        world: dict[str, FakeHost] | None = None,
        state: Any = None,
        found: bool = True,
    ) -> None:
        self.plan = plan
        self.world: dict[str, FakeHost] = {} if world is None else world

        def steps(placements: PlacementController) -> TrainingSteps:
            hosts = placements if n_hosts else None
            return TrainingSteps(
                plan,
                (L, E),
                hosts,
                beginning=beginning or self.begin,
                step=step,
                bias=bias,
                note=placements.roster.note,
            )

        self.coordinator = Coordinator(
            PlacementSpec(layers=tuple(range(L)), n_experts=E, n_group=1),
            HostPolicy(hosts=n_hosts, dead_after=dead_after),
            control=lambda info: self.world[info.id],
            initial=InitialWeights(step=step),
            steps=steps,
            state=state,
        )
        self.steps = self.coordinator.steps
        if not self.world:
            for at in range(n_hosts):
                FakeHost(f"host-{at}", self.world)
        for id in self.world:
            self.coordinator.register_host(HostInfo(id=id))
        if n_hosts and found:
            self.coordinator.place_experts()
        self.pool = ThreadPoolExecutor(8)
        if found:
            for rank in range(plan.workers):
                self.join(rank)

    @property
    def hosts(self) -> list[FakeHost]:
        return list(self.world.values())

    def begin(self) -> Beginning:
        return Beginning(directory="", step=0, moments=False, bias=torch.zeros(L, E))

    def add(self, id: str) -> FakeHost:
        host = FakeHost(id, self.world)
        self.coordinator.register_host(HostInfo(id=id))
        return host

    def join(self, rank: int, attempt: int = -1) -> Resume:
        """Join as a worker does, and put the trunk's state into the hosts' memory."""
        resume = self.steps.join(rank, self.plan.workers, attempt, "something was lost", timeout=20)
        self.keep_trunk(resume.step)
        return resume

    def rejoin(self, attempt: int) -> Resume:
        """Let all workers join after an attempt that was interrupted."""
        joining = [self.pool.submit(self.join, rank, attempt) for rank in range(self.plan.workers)]
        return [one.result(20) for one in joining][-1]

    def keep_trunk(self, step: int) -> None:
        for host in self.hosts:
            if not host.dead and not host.hung:
                host.put(Blob(name=TRUNK, step=step, tensors={}))

    def report(self, worker: int, step: int = 0, **fields: Any) -> Future[Any]:
        return self.pool.submit(self.steps.report, report(worker, step, **fields))

    def end_step(self, step: int, **fields: Any) -> Any:
        pending = [self.report(worker, step, **fields) for worker in range(self.plan.workers)]
        decisions = [one.result(20) for one in pending]
        assert decisions[0] is decisions[1]
        if decisions[0].snapshot:
            self.keep_trunk(step + 1)
        return decisions[0]

    def lose(self, id: str) -> None:
        """Kill a host and report its loss to the coordinator."""
        self.world[id].dead = True
        self.coordinator.roster.lose(id, "its process ended")

    def close(self) -> None:
        for host in self.hosts:
            host.gate.set()
        self.coordinator.close()
        self.pool.shutdown()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def report(worker: int, step: int = 0, **fields: Any) -> StepReport:
    loads = torch.zeros(L, E, dtype=torch.int64)
    loads[:, worker] = 10
    return StepReport(worker=worker, step=step, **{"loads": loads, **fields})


__all__ = ["PLAN", "E", "L", "Run", "report"]
