"""The drain of a host while other changes of the number of hosts are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from actors.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.coordinator.servicer import AdminServicer
from actors.coordinator.transfer_plan import PlacementSpec
from actors.rpc.admin_client import AdminClient
from actors.rpc.control_server import ControlServer
from cluster.topology import HostInfo
from errors import ChangeUnderWay, ResourceError
from protos import admin_pb2_grpc
from support.fakes.fake_hosts import FakeHost
from support.waiting import wait_until


class ServingJob:
    """A coordinator of two serving hosts, and a drain of host-0 that waits for another host."""

    def __init__(self, stack: ExitStack) -> None:
        self.world: dict[str, FakeHost] = {}
        spec = PlacementSpec(layers=(0, 1), n_experts=4, n_group=1)
        self.coordinator = Coordinator(
            spec,
            HostPolicy(hosts=2),
            control=lambda info: self.world[info.id],
            initial=InitialWeights(name="weights", directory="directory"),
        )
        stack.callback(self.coordinator.close)
        for at in range(2):
            self.add(at)
        self.coordinator.place_experts()
        server = ControlServer(
            lambda server: admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(self.coordinator), server)
        )
        stack.callback(server.close)
        self.admin = AdminClient(server.address)
        stack.callback(self.admin.close)
        threads = stack.enter_context(ThreadPoolExecutor(1))
        self.drain: Future[dict[str, Any]] = threads.submit(
            self.admin.drain, "host-0", replace=True, timeout=20.0
        )
        wait_until(lambda: self.coordinator.roster.leaving() == ("host-0",))

    def add(self, at: int) -> None:
        host = FakeHost(f"host-{at}", self.world)
        self.coordinator.register_host(HostInfo(id=host.id))


@pytest.fixture
def job() -> Iterator[ServingJob]:
    with ExitStack() as stack:
        yield ServingJob(stack)


def test_an_automatic_change_does_not_take_the_place_of_a_drain(job: ServingJob) -> None:
    with pytest.raises(ChangeUnderWay, match="the change to 2 expert hosts is under way"):
        job.admin.scale(3, timeout=0.0, why="2 nodes")
    job.add(2)
    assert job.drain.result(20)["done"] is True
    assert set(job.coordinator.roster.stages()) == {"host-1", "host-2"}
    job.admin.scale(3, timeout=0.0, why="2 nodes")
    assert [event["text"] for event in job.admin.events() if event["kind"] == "autoscaled"] == ["2 nodes"]


def test_a_drain_whose_place_a_scale_takes_ends_when_the_host_has_left(job: ServingJob) -> None:
    job.admin.scale(3, timeout=0.0)
    job.admin.scale(4, timeout=0.0)
    for at in (2, 3, 4):
        assert "host-0" in job.coordinator.roster.stages(), "there are too few others"
        job.add(at)
    done = job.drain.result(20)
    assert (done["done"], done["hosts"]) == (True, 4)
    assert "host-0" not in job.coordinator.roster.stages()


def test_a_drain_whose_host_stays_after_all_says_why(job: ServingJob) -> None:
    job.admin.scale(3, timeout=0.0)
    job.coordinator.orders(starting=0, failed={"host-2": "no CPUs"}, stopped=[])
    with pytest.raises(ResourceError, match="host-0 stays: expert host host-2 did not start: no CPUs"):
        job.drain.result(20)
