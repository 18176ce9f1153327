"""The processes of a Ray cluster that a command starts: in sessions of their own, watched and ended.

Ray has no setting for some of this, so `adjusted` replaces names within Ray for the time of a start. They
are those of Ray 2.60; a test checks that the installed Ray has them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from ray._private import node, parameter, ray_constants, services, utils, worker

from errors import ResourceError

_LONGEST_SECONDS = 600.0  # that the processes of a cluster may take to start
_STALLED_SECONDS = 60.0  # without progress after which a start is given up
_PROGRESS = 2.0  # seconds of CPU in that time that count as progress
_POLL_SECONDS = 0.1
_LOOK_MILLISECONDS = 100
_GRACE_SECONDS = 5.0
_AGENT_PORTS = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
_NEEDED = ("gcs_server", "raylet")  # a cluster works without Ray's other processes
_ERROR = re.compile(r"^\[\S+ \S+ [EC] .*?\] \(\w+\) [\w.]+:\d+: (.+)$", re.MULTILINE)
_GUARD = r"""
while read -r session; do sessions="$sessions $session "; done
for file in /proc/[0-9]*/stat; do
    read -r line < "$file" || continue
    set -- ${line##*) }  # after the name, which can contain spaces: state, parent, group, session
    case "$sessions" in *" $4 "*) kill -9 "$(basename "${file%/stat}")" ;; esac
done
"""
"""Reads numbers of sessions; when the command that writes them has ended, kills all processes of these."""

_SETTINGS = {
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_worker_register_timeout_seconds": "180",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
}
"""How long processes of Ray wait for each other while they start; Ray waits too briefly on a busy machine."""


class RayProcesses:
    """The processes of one cluster, and its folder of sockets and logs.

    If the command is killed, a small process kills theirs: some of Ray's would take minutes to end.

    Attributes:
        folder: The folder of the cluster's session; None until Ray has made it.
    """

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._names: dict[int, str] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._used: dict[tuple[int, float], float] = {}
        self.folder: Path | None = None

    @property
    def ended(self) -> str:
        """What has ended by itself although the cluster needs it, with its last error; empty if all live."""
        for process in self._started:
            name = self._names[process.pid]
            if name in _NEEDED and process.poll() is not None:
                return f"its {name} has ended with code {process.returncode}{self._last_error(name)}"
        return ""

    @property
    def cpu_seconds(self) -> float:
        """CPU time in seconds that the processes and their children have used; it never falls.

        A process that has ended counts with what it had used when it was last asked for.
        """
        for process in self.family():
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._used[process.pid, process.create_time()] = times.user + times.system
        return sum(self._used.values())

    def family(self) -> list[psutil.Process]:
        """The processes that live, with all their children."""
        found = []
        for process in self._started:
            if process.poll() is None:
                with suppress(psutil.Error):
                    parent = psutil.Process(process.pid)
                    found += [parent, *parent.children(recursive=True)]
        return found

    def add(self, process: subprocess.Popen[bytes], program: str) -> None:
        """Add a started process to the cluster."""
        self._started.append(process)
        self._names[process.pid] = os.path.basename(program)
        if self._guard is None:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.write(b"%d\n" % process.pid)
            self._guard.stdin.flush()

    def end(self, family: list[psutil.Process], *, grace: float = _GRACE_SECONDS) -> None:
        """Kill those of `family` that have not ended after `grace` seconds."""
        _, alive = psutil.wait_procs(family, timeout=grace)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=_GRACE_SECONDS)
        for started in self._started:
            started.poll()
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None

    def _last_error(self, name: str) -> str:
        if self.folder is not None:
            with suppress(OSError):
                text = (self.folder / "logs" / f"{name}.out").read_text(encoding="utf-8", errors="replace")
                if found := _ERROR.findall(text):
                    return f": {found[-1].strip()}"
        return ""

    def delete_folder(self) -> None:
        """Delete the cluster's session folder, and the `session_latest` link if it points to it."""
        if self.folder is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        link = self.folder.with_name(ray_constants.SESSION_LATEST)
        with suppress(OSError):
            if os.readlink(link) == str(self.folder):
                link.unlink()


@contextmanager
def adjusted(processes: RayProcesses | None, *, debug: bool) -> Iterator[None]:
    """Adjust what `ray.init` does within the context.

    - The caller's handler of SIGTERM stays.
    - Without `debug`, Ray prints no lines about processes that died: a command says itself what that means.
    - The folder of the session that it starts is noted; its name alone could be that of another container.
    - Processes that it starts get sessions of their own, so that a signal to the command's process group ends
      them in order, by the command.
    - It waits for them as long as they make progress.

    Args:
        processes: Gets the processes that are started, and the folder of their session.
        debug: Whether the command shows the output of actors.
    """
    with ExitStack() as stack:
        stack.enter_context(_replaced(utils, "set_sigterm_handler", lambda _: None))
        stack.enter_context(_sigterm_kept())
        if not debug:
            stack.enter_context(_replaced(worker, "listen_error_messages", lambda *_: None))
        if processes is not None:
            started = processes

            class _OwnSession(services.ConsolePopen):  # type: ignore[misc]  # Ray has no types
                def __init__(self, command: list[str], **kwargs: Any) -> None:
                    super().__init__(command, start_new_session=True, **kwargs)
                    started.add(self, command[0])

            stack.enter_context(_replaced(services, "ConsolePopen", _OwnSession))
            stack.enter_context(_replaced(node.Node, "_init_temp", _noted(node.Node._init_temp, processes)))
            stack.enter_context(_replaced(services, "get_node", _patient(services.get_node, processes)))
            parameters = partial(parameter.RayParams, **_agent_ports())
            stack.enter_context(_replaced(parameter, "RayParams", parameters))
            port = partial(_look_for_port, node.wait_for_persisted_port)
            stack.enter_context(_replaced(node, "wait_for_persisted_port", _patient(port, processes)))
            stack.enter_context(_replaced(ray_constants, "RAY_DASHBOARD_STARTUP_TIMEOUT_S", _LONGEST_SECONDS))
            stack.enter_context(_environment(_SETTINGS))
        yield


def _agent_ports() -> dict[str, int]:
    """Free ports for the agents of a node; Ray gives agents that choose theirs 30 s to start."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in _AGENT_PORTS]
        return {name: probe.getsockname()[1] for name, probe in zip(_AGENT_PORTS, probes, strict=True)}


def _noted(make: Callable[..., Any], processes: RayProcesses) -> Callable[..., Any]:
    """Ray's function that makes the folder of a node's session, made to note it; also if it is stopped."""

    def noted(made: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return make(made, *args, **kwargs)
        finally:
            if folder := getattr(made, "_session_dir", None):
                processes.folder = Path(folder)

    return noted


def _look_for_port(wait: Callable[..., Any], *args: Any, timeout_ms: int) -> Any:
    """The port that a process of Ray has stored, without Ray's wait, in which no signal is handled."""
    return wait(*args, timeout_ms=min(timeout_ms, _LOOK_MILLISECONDS))


def _patient(ask: Callable[..., Any], processes: RayProcesses) -> Callable[..., Any]:
    """A function of Ray that fails until a process has started, made to wait longer than Ray's 30 s."""

    def wait(*args: Any, **kwargs: Any) -> Any:
        began = looked = time.monotonic()
        used = processes.cpu_seconds
        while True:
            try:
                return ask(*args, **kwargs)
            except Exception as error:
                now = time.monotonic()
                if ended := processes.ended:
                    raise ResourceError(ended) from error
                if now - began > _LONGEST_SECONDS:
                    raise ResourceError(f"its node has not started within {now - began:.0f} s") from error
                if now - looked > _STALLED_SECONDS:
                    progress = processes.cpu_seconds - used
                    if progress < _PROGRESS:
                        raise ResourceError(
                            f"its node has not started within {now - began:.0f} s, and its processes have "
                            f"used {progress:.1f} s of CPU in the last {now - looked:.0f} s"
                        ) from error
                    looked, used = now, used + progress
            time.sleep(_POLL_SECONDS)

    return wait


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM; the one of Ray's C++ library prints a stack, and aborts later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.alarm(0)  # which that handler has set, if SIGTERM came meanwhile


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, for processes that are started within the context."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


__all__ = ["RayProcesses", "adjusted"]
