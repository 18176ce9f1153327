"""The faults that `raymoe chaos` plans (kinds, targets and times), and the processes that it draws."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.tools import chaos
from jobs.tools.chaos import TARGETS, Fault, FaultKind, processes, run_chaos, schedule


@given(
    seed=st.integers(0, 1000),
    duration=st.floats(0, 100),
    kinds=st.lists(st.sampled_from(FaultKind), min_size=1, unique=True),
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
)
def test_a_seed_is_a_schedule(seed: int, duration: float, kinds: list[FaultKind], targets: list[str]) -> None:
    def drawn() -> Any:
        return schedule(seed, duration=duration, every=5.0, kinds=kinds, targets=targets)

    faults = drawn()
    assert faults == drawn()
    times = [fault.at for fault in faults]
    assert times == sorted(times) and all(0 <= at <= duration for at in times)
    for fault in faults:
        assert fault.kind in kinds and 0 <= fault.pick < 1
        assert fault.target == "host" if fault.kind is FaultKind.DROP else fault.target in targets


def test_faults_come_as_often_as_asked_for() -> None:
    faults = schedule(0, duration=10_000, every=5.0, kinds=list(FaultKind), targets=list(TARGETS))
    assert len(faults) == pytest.approx(2000, rel=0.1)
    assert {fault.kind for fault in faults} == set(FaultKind)
    assert {fault.target for fault in faults} == set(TARGETS)


def actor(name: str, pid: int, job: str = "02", state: str = "ALIVE", node: str = "n0") -> dict[str, Any]:
    def address(pid: int) -> dict[str, Any]:
        return {"NodeID": node, "Port": 1000 + pid}

    return {
        "ActorID": f"actor-{node}-{pid}",
        "ActorClassName": name,
        "Pid": pid,
        "JobID": job,
        "State": state,
        "Address": address(pid),
        "OwnerAddress": address(50),
    }


STATUS = {"actor": "actor-n0-10", "hosts": [{"node": "n1", "pid": 21}, {"node": "n0", "pid": 20}]}
ACTORS = [
    actor("_CoordinatorProcess", 10),
    actor("_CoordinatorProcess", 10, job="04", node="n1"),  # of another job, with the same process id
    actor("ServeReplica:mine:experts", 50),
    actor("ServeReplica:other:experts", 51),
    actor("_CoordinatorProcess", 11),  # a standby
    actor("_CoordinatorProcess", 12, job="03"),
    actor("_ExpertHostProcess", 20),
    actor("ServeReplica:mine:trunk", 31, node="n1"),
    actor("ServeReplica:mine:trunk", 30),
    actor("ServeReplica:mine:trunk", 32, state="DEAD"),
    actor("ServeReplica:other:trunk", 33),
    actor("ServeReplica:mine:api", 34),
    actor("RayTrainWorker", 40),
    actor("RayTrainWorker", 41, job="03"),
]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("host", [("n0", 20), ("n1", 21)]),
        ("coordinator", [("n0", 10)]),
        ("trunk", [("n0", 30), ("n1", 31)]),
        ("worker", [("n0", 40)]),
    ],
)
def test_only_a_jobs_own_processes_are_touched(target: str, expected: list[tuple[str, int]]) -> None:
    assert processes(target, STATUS, ACTORS) == expected


def test_without_a_coordinator_there_is_nobody_to_be_found() -> None:
    assert processes("trunk", {"actor": "", "hosts": []}, ACTORS) == []


class LaggingJob:
    """A fake coordinator's client, whose status does not change after the death of a host."""

    def __init__(self, *pids: int) -> None:
        self.hosts = [{"id": f"host-{pid}", "node": "n0", "pid": pid, "addresses": {}} for pid in pids]

    def status(self) -> dict[str, Any]:
        return {"actor": "actor-n0-10", "hosts": self.hosts}


@dataclass(frozen=True, eq=False)
class FakeTask:
    """A Ray task that has ended, and its result; as a remote function, what it calls."""

    work: Callable[..., Any]
    result: Any = None

    def remote(self, *given: Any) -> FakeTask:
        return FakeTask(self.work, self.work(*given))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in the test's own process, on a cluster without actors."""
    monkeypatch.setattr(chaos, "actors", dict)
    monkeypatch.setattr(chaos, "_on", lambda _, work: FakeTask(work))
    monkeypatch.setattr(chaos.ray, "wait", lambda tasks, **_: (tasks, []))
    monkeypatch.setattr(chaos.ray, "get", lambda task: task.result)


def fault(kind: FaultKind) -> Fault:
    return Fault(at=0.0, kind=kind, target="host", pick=0.0)


@pytest.mark.usefixtures("without_ray")
def test_a_killed_process_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hit: list[int] = []
    monkeypatch.setattr(chaos, "_do", lambda pid, *_: hit.append(pid) or True)
    kinds = [FaultKind.STOP, FaultKind.KILL, FaultKind.SLOW, FaultKind.KILL, FaultKind.KILL, FaultKind.DROP]
    job: Any = LaggingJob(20, 21)
    done = run_chaos(job, [fault(kind) for kind in kinds], tell=lambda _: None)
    assert hit == [20, 20, 21, 21]
    assert [one["how"] for one in done[3:]] == [
        "process 21 on node n0",
        "not done: there is none",
        "not done: there is no expert host",
    ]


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("kind", [FaultKind.KILL, FaultKind.STOP, FaultKind.SLOW])
def test_a_process_that_was_gone_does_not_count(kind: FaultKind) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    said: list[str] = []
    job: Any = LaggingJob(ended.pid)
    (done,) = run_chaos(job, [fault(kind)], tell=said.append)
    assert done["how"] == f"not done: process {ended.pid} on node n0 was gone already"
    assert said[-1].endswith(f"{kind} host: {done['how']}")
