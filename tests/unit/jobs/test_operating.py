"""Commands that operate running jobs: which job they take, what they say, and how they end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from actors.rpc.control_server import ControlServer, refusing
from errors import ResourceError
from jobs.cli.app import app
from jobs.fleet.job_notices import JobNotice, local_jobs, posted
from jobs.tools import cluster_jobs, running_job
from jobs.tools.jobs_found import HERE, JobsFound, RunningJob
from jobs.tools.status_view import shown
from protos import admin_pb2, admin_pb2_grpc

ROOT = Path(__file__).parents[3]
STATUS: dict[str, Any] = {
    "job": {"id": "1a", "name": "alpha", "cluster": "127.0.0.1:6379"},
    "mode": "train",
    "step": 1200,
    "steps": 5000,
    "steps_to_go": 3800,
    "attempt": 2,
    "weights": "",
    "reloads": 0,
    "epoch": 4,
    "wanted": 2,
    "lacking": "",
    "replicas_min": 1,
    "replicas_max": 1,
    "hosts": [],
    "events": [],
}


class StubJob(admin_pb2_grpc.AdminServicer):
    """A job that answers its operators and records what they ask for."""

    def __init__(self, id: str, name: str, doing: str) -> None:
        self.id, self.name, self.doing = id, name, doing
        self.asked: list[str] = []
        self.done, self.lacking, self.failure = True, "", ""

    def Describe(self, request: Any, context: grpc.ServicerContext) -> admin_pb2.DescribeJobReply:
        return admin_pb2.DescribeJobReply(
            id=self.id, name=self.name, cluster="127.0.0.1:6379", doing=self.doing
        )

    def Status(self, request: Any, context: grpc.ServicerContext) -> admin_pb2.StatusOfJobReply:
        self.asked.append("status")
        return admin_pb2.StatusOfJobReply(status=json.dumps(STATUS))

    def Events(self, request: Any, context: grpc.ServicerContext) -> admin_pb2.EventsReply:
        return admin_pb2.EventsReply(recorder="r")

    def Scale(self, request: Any, context: grpc.ServicerContext) -> admin_pb2.ScaleReply:
        self.asked.append(f"scale {request.hosts}")
        with refusing(context):
            if self.failure:
                raise ResourceError(self.failure)
        return admin_pb2.ScaleReply(done=self.done, hosts=request.hosts, seconds=1.25, lacking=self.lacking)

    def Drain(self, request: Any, context: grpc.ServicerContext) -> admin_pb2.ScaleReply:
        self.asked.append(f"drain {request.host}")
        return admin_pb2.ScaleReply(done=self.done, hosts=2, seconds=1.25)


class Machine:
    """A machine on which stub jobs run."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def start(self, id: str, name: str, doing: str = "trains, at step 3 of 9") -> StubJob:
        job = StubJob(id, name, doing)
        server = ControlServer(lambda server: admin_pb2_grpc.add_AdminServicer_to_server(job, server))
        self._stack.callback(server.close)
        self._stack.enter_context(
            posted(JobNotice(id=id, name=name, cluster="127.0.0.1:6379", coordinator=server.address))
        )
        return job

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine without other jobs and Ray clusters."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(running_job, "local_addresses", list)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = Machine()
    yield made
    made.close()


def raymoe(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


COMMANDS = [["status"], ["scale", "3"], ["drain", "host-0"], ["chaos"], ["chaos", "--dry-run"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_of_several_jobs_none_is_taken(machine: Machine, command: list[str]) -> None:
    jobs = [machine.start("1a", "alpha"), machine.start("2b", "beta", "serves the weights x")]
    result = raymoe(*command)
    assert result.exit_code == 2
    assert result.stdout == ""
    said = result.stderr.splitlines()
    assert said[0] == "error: 2 jobs run on this machine; say which with --job NAME or ID"
    assert "alpha  1a  trains, at step 3 of 9" in said[1] and "Ray cluster 127.0.0.1:6379" in said[1]
    assert "beta   2b  serves the weights x" in said[2]
    assert [job.asked for job in jobs] == [[], []]


@pytest.mark.parametrize("named", ["beta", "2b"])
def test_a_job_is_chosen_by_name_or_id_and_named_in_the_answer(machine: Machine, named: str) -> None:
    alpha, beta = machine.start("1a", "alpha"), machine.start("2b", "beta")
    assert raymoe("status", "--job", named).exit_code == 0
    scaled = raymoe("scale", "3", "--job", named)
    drained = raymoe("drain", "host-0", "--job", named, "--json")
    rehearsed = raymoe("chaos", "--dry-run", "--job", named)
    assert alpha.asked == []
    assert beta.asked == ["status", "scale 3", "drain host-0"]
    assert scaled.stdout.startswith("beta (2b, Ray cluster 127.0.0.1:6379): 3 expert hosts after 1.25 s")
    assert json.loads(drained.stdout)["job"]["id"] == "2b"
    assert "would hit beta (2b" in rehearsed.stderr


def test_jobs_of_one_name_are_told_apart_by_their_ids(machine: Machine) -> None:
    jobs = [machine.start(id, "demo") for id in ("1a", "2b")]
    result = raymoe("status", "--job", "demo")
    assert result.exit_code == 2
    assert "2 jobs of this name run on this machine; give the id" in result.stderr
    assert [job.asked for job in jobs] == [[], []]
    unknown = raymoe("status", "--job", "other")
    assert unknown.exit_code == 2
    assert "no job of this name or id runs on this machine" in unknown.stderr


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_that_nothing_runs_is_said(machine: Machine, command: list[str]) -> None:
    result = raymoe(*command)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no raymoe job with a coordinator runs on this machine")


@pytest.mark.parametrize(
    "given", ["foo", "foo:", ":6379", "foo:0", "foo:70000", "::1:5", "http://foo:80", ""]
)
def test_a_coordinator_is_host_and_port(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def described(at: str) -> RunningJob:
        raise AssertionError(at)

    monkeypatch.setattr(running_job, "described", described)
    result = raymoe("status", "--coordinator", given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: --coordinator is {given!r}; give HOST:PORT\n"


@pytest.mark.parametrize("given", ["foo:6379", "10.0.0.1:1", "[::1]:5", "grpc:foo:6379"])
def test_a_coordinator_may_have_a_name_or_a_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_job, "described", lambda at: RunningJob(coordinator=at))
    found = running_job.find_jobs(coordinator=given, address=None)
    assert found.jobs[0].coordinator == f"grpc:{given.removeprefix('grpc:')}"


def test_a_coordinator_that_cannot_be_reached_is_told_in_a_sentence() -> None:
    result = raymoe("status", "--coordinator", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no coordinator answers at 127.0.0.1:1; give --coordinator the")
    assert result.stderr.count("\n") == 1


def test_a_rehearsal_can_be_planned_without_a_job(machine: Machine) -> None:
    result = raymoe("chaos", "--dry-run", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["job"] is None
    assert "this is the schedule alone" in result.stderr


@pytest.mark.parametrize("command", [["scale", "4"], ["drain", "host-0"]])
def test_a_change_that_is_not_done_in_time_is_no_success(machine: Machine, command: list[str]) -> None:
    job = machine.start("1a", "alpha")
    job.done, job.lacking = False, "no node has 1 CPU free"
    late = raymoe(*command, "--timeout", "0.5", "--json")
    assert late.exit_code == 1
    assert json.loads(late.stdout)["done"] is False
    assert "is not done after 0.5 s" in late.stderr
    assert ("(no node has 1 CPU free)" in late.stderr) is (command[0] == "scale")
    at_once = raymoe(*command, "--timeout", "0")
    assert at_once.exit_code == 0
    assert at_once.stdout.startswith("alpha (1a, Ray cluster 127.0.0.1:6379): changing to")


def test_a_change_that_fails_says_why(machine: Machine) -> None:
    machine.start("1a", "alpha").failure = "the change was given up"
    result = raymoe("scale", "4")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "the change was given up" in result.stderr


@pytest.mark.parametrize("number", ["-1", "0"])
def test_a_number_of_hosts_that_cannot_be_gets_one_line(machine: Machine, number: str) -> None:
    job = machine.start("1a", "alpha")
    result = raymoe("scale", number)
    assert result.exit_code == 2
    assert result.stderr == f"error: N is {number}: a job has at least 1 expert host\n"
    assert job.asked == []


def test_a_job_that_does_not_answer_is_listed_as_such(machine: Machine, tmp_path: Path) -> None:
    machine.start("1a", "alpha")
    dead = JobNotice(id="2b", name="beta", cluster="127.0.0.1:6380", coordinator="grpc:127.0.0.1:9")
    with posted(dead):
        assert "beta   2b  does not answer" in raymoe("status").stderr


@pytest.mark.parametrize("command", [["status"], ["scale", "3"], ["drain", "host-0"], ["chaos"]])
def test_a_job_at_the_port_of_another_one_is_left_alone(machine: Machine, command: list[str]) -> None:
    beta = machine.start("2b", "beta")
    (notice,) = local_jobs()
    with posted(JobNotice(id="1a", name="alpha", cluster=notice.cluster, coordinator=notice.coordinator)):
        result = raymoe(*command, "--job", "1a")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith(
        "is the address of another job, beta (2b); nothing was done"
    )
    assert beta.asked == []


def test_jobs_of_clusters_without_a_notice_count_for_what_changes_a_job(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha = machine.start("1a", "alpha")
    other = RunningJob(coordinator="grpc:127.0.0.1:9", id="2b", name="beta", cluster="127.0.0.1:6380")
    looked: list[list[str]] = []

    def jobs_of(addresses: list[str], *, debug: bool) -> JobsFound:
        looked.append(addresses)
        return JobsFound([other], HERE)

    monkeypatch.setattr(running_job, "local_addresses", lambda: ["127.0.0.1:6379", other.cluster])
    monkeypatch.setattr(cluster_jobs, "jobs_of", jobs_of)
    assert raymoe("status").exit_code == 0
    assert looked == [], "what only shows a job needs no Ray"
    for command in (["scale", "3"], ["drain", "host-0"], ["chaos"]):
        assert raymoe(*command).stderr.startswith("error: 2 jobs run on this machine; say which")
    assert looked == [["127.0.0.1:6380"]] * 3
    assert raymoe("scale", "3", "--job", "alpha").exit_code == 0
    assert alpha.asked == ["status", "scale 3"]


def test_a_coordinator_that_does_not_answer_ray_is_no_job_to_choose(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = machine.start("1a", "alpha")
    found: list[str] = []
    monkeypatch.setattr(cluster_jobs, "on_cluster", lambda address, debug: nullcontext(address))
    monkeypatch.setattr(cluster_jobs, "seen_coordinators", lambda: (found, ["coordinator-77"]))
    note = (
        "1 coordinator on the Ray cluster at h:1 did not answer, so other jobs may run there: coordinator-77"
    )
    none = raymoe("scale", "3", "--address", "h:1")
    assert none.exit_code == 1
    assert none.stderr.startswith("error: no raymoe job with a coordinator runs on the Ray cluster at h:1")
    assert none.stderr.endswith(f"{note}\n")
    found += [one.coordinator for one in local_jobs()]
    one = raymoe("scale", "3", "--address", "h:1")
    assert (one.exit_code, one.stderr, job.asked) == (0, f"{note}\n", ["scale 3"])


def test_status_says_what_is_left_to_do() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(shown(STATUS))
    assert console.export_text().splitlines()[0] == (
        "alpha (1a) trains, at step 1,200 of 5,000, 3,800 to go, interrupted 2 times"
    )
    served = {**STATUS, "mode": "serve", "weights": "step-7", "reloads": 1, "lacking": "no CPUs"}
    console.print(shown(served))
    lines = console.export_text().splitlines()
    assert "alpha (1a) serves the weights step-7, after 1 reload" in lines
    assert "no CPUs" in lines


def test_status_of_this_machines_job_needs_neither_ray_nor_torch(machine: Machine, tmp_path: Path) -> None:
    machine.start("1a", "alpha")
    script = (
        "import sys; from jobs.cli.app import app\n"
        "try:\n    app(['status'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "alpha (1a) trains" in done.stdout
