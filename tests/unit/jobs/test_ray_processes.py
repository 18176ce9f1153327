"""The processes that Ray starts for a command, with small ones in place of Ray's."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray._private import node, parameter, ray_constants, services, utils, worker

from errors import ResourceError
from jobs.fleet import ray_processes
from jobs.fleet.ray_processes import _SETTINGS as SETTINGS
from jobs.fleet.ray_processes import RayProcesses, adjusted

ADDRESS, NODE = "127.0.0.1:1", "node"


@pytest.fixture
def processes() -> Iterator[RayProcesses]:
    found = RayProcesses()
    yield found
    found.end(found.family(), grace=0.0)


def _start(*command: str) -> psutil.Process:
    started = services.start_ray_process(list(command), "test", fate_share=True)
    return psutil.Process(started.process.pid)


def test_processes_have_groups_of_their_own_and_end_with_their_children(processes: RayProcesses) -> None:
    with adjusted(processes, debug=False):
        parent = _start("sh", "-c", "sleep 1000 & wait")
    assert os.getpgid(parent.pid) == parent.pid != os.getpgrp()
    while not parent.children():
        pass
    family = processes.family()
    assert len(family) == 2
    parent.send_signal(signal.SIGKILL)  # what Ray does with its own; it leaves the child
    processes.end(family, grace=0.0)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)


def test_a_command_that_is_killed_takes_them_with_it(processes: RayProcesses) -> None:
    """Also children in process groups of their own, as Ray's agents are."""
    with adjusted(processes, debug=False):
        _start("sh", "-c", "timeout 1000 sleep 1000 & wait")
    family = processes.family()
    while len(family) < 3 or len({os.getpgid(one.pid) for one in family}) < 2:  # that of `timeout`
        family = processes.family()
    guard = processes._guard
    assert guard is not None
    guard.communicate(timeout=60)  # its input ends as with the command
    psutil.wait_procs(family, timeout=60)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)


def test_ray_has_the_names_that_are_replaced_and_gets_them_back() -> None:
    """The names, and the callers in Ray that look them up."""
    names = [
        (services, "ConsolePopen", services.start_ray_process, "ConsolePopen("),
        (node.Node, "_init_temp", node.Node.__init__, "self._init_temp("),
        (services, "get_node", node.Node.__init__, "services.get_node("),
        (node, "wait_for_persisted_port", node.Node.start_gcs_server, " wait_for_persisted_port("),
        (parameter, "RayParams", worker.init, "parameter.RayParams("),
        (utils, "set_sigterm_handler", worker.init, "utils.set_sigterm_handler("),
        (worker, "listen_error_messages", worker.connect, "target=listen_error_messages"),
        (
            ray_constants,
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S",
            services.start_api_server,
            "ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S",
        ),
    ]
    before = [getattr(module, name) for module, name, _, _ in names]
    for _, _, caller, use in names:
        assert use in inspect.getsource(inspect.unwrap(caller))
    with adjusted(RayProcesses(), debug=False):
        assert all(
            getattr(module, name) is not old for (module, name, _, _), old in zip(names, before, strict=True)
        )
        ports = parameter.RayParams()
        assert min(ports.metrics_agent_port, ports.dashboard_agent_listen_port) > 0
        assert ports.runtime_env_agent_port > 0
        assert SETTINGS.items() <= os.environ.items()
    assert [getattr(module, name) for module, name, _, _ in names] == before
    assert not SETTINGS.keys() & os.environ.keys()


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes Ray's `get_node` fail as long as the list has elements, of which each call takes one."""
    left: list[int] = []

    def get_node(address: str, node: str) -> dict[str, str]:
        assert (address, node) == (ADDRESS, NODE)
        if left:
            left.pop()
            raise RuntimeError("no such node yet")
        return {"NodeID": node}

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray_processes, "_POLL_SECONDS", 0.0)
    return left


def test_a_node_is_waited_for_as_long_as_its_processes_compute(
    processes: RayProcesses, unregistered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    unregistered[:] = range(50)
    monkeypatch.setattr(ray_processes, "_STALLED_SECONDS", 0.0)
    monkeypatch.setattr(ray_processes, "_PROGRESS", 0.0)
    with adjusted(processes, debug=False):
        assert services.get_node(ADDRESS, NODE) == {"NodeID": NODE}
    assert not unregistered


def test_a_process_that_ends_takes_no_progress_with_it(
    processes: RayProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU time only grows, whichever processes live and whichever number is used again."""
    alive: list[Any] = []

    def process(pid: int, born: float, user: float) -> Any:
        times = SimpleNamespace(user=user, system=1.0)
        return SimpleNamespace(pid=pid, create_time=lambda: born, cpu_times=lambda: times)

    monkeypatch.setattr(processes, "family", lambda: alive)
    alive[:] = [process(1, 1.0, 2.0), process(2, 1.0, 40.0)]
    assert processes.cpu_seconds == 3.0 + 41.0
    alive[:] = [process(1, 1.0, 5.0)]
    assert processes.cpu_seconds == 6.0 + 41.0
    alive[:] = [process(1, 1.0, 5.0), process(2, 9.0, 1.0)]
    assert processes.cpu_seconds == 6.0 + 41.0 + 2.0


def test_the_folder_that_ray_makes_is_noted(processes: RayProcesses, tmp_path: Path) -> None:
    made = node.Node.__new__(node.Node)
    made.head, made._session_name = True, "session_1"
    made._ray_params = parameter.RayParams(temp_dir=str(tmp_path))
    with adjusted(processes, debug=False):
        made._init_temp(None)
    assert processes.folder == tmp_path / "session_1"
    assert (tmp_path / "session_latest").readlink() == processes.folder
    processes.delete_folder()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [("raylet", "its raylet has ended with code 1: no agent came$"), ("sleep", "have used 0.0 s of CPU")],
)
def test_a_node_that_cannot_come_is_given_up(
    processes: RayProcesses,
    unregistered: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    said: str,
) -> None:
    unregistered[:] = range(1_000_000)
    processes.folder = tmp_path / "session_1"
    logs = processes.folder / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text(
        "[2026-01-02 03:04:05,678 E 12 12] (raylet) agent.cc:9: no agent came\n"
        "[2026-01-02 03:04:05,679 I 12 12] (raylet) main.cc:10: the end\n",
        encoding="utf-8",
    )
    program = tmp_path / name
    program.write_text("#!/bin/sh\nexit 1\n" if name == "raylet" else "#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    with adjusted(processes, debug=False):
        _start(str(program))
        if name == "sleep":
            monkeypatch.setattr(ray_processes, "_STALLED_SECONDS", 0.0)
        with pytest.raises(ResourceError, match=said):
            services.get_node(ADDRESS, NODE)
