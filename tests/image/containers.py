"""Containers as the chart's pods are: read-only, uid 1000, no capability; on a loopback that they share."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Without limits podman asks for its own defaults, which a user who may not raise limits does not get.
_MOST = {"nofile": (resource.RLIMIT_NOFILE, 65536), "nproc": (resource.RLIMIT_NPROC, 8192)}
_SECURITY = (
    *("--read-only", "--read-only-tmpfs=false", "--user", "1000:1000"),
    *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
    *("--tmpfs", "/tmp:rw,mode=1777,size=2g", "--tmpfs", "/home/ray:rw,size=256m,U"),
    *("--shm-size", "1g"),
)


class Containers:
    """Starts containers of one image, and removes every one of them at the end.

    Args:
        podman: the command, with its options.
        volumes: folders of this machine -> where containers see them.
        env: variables of all containers; values do not appear on command lines.
    """

    def __init__(
        self, podman: Sequence[str], image: str, *, volumes: dict[Path, str], env: dict[str, str]
    ) -> None:
        self._podman, self._image = list(podman), image
        self._volumes = [part for here, there in volumes.items() for part in ("--volume", f"{here}:{there}")]
        self._env = [part for name in env for part in ("--env", name)]
        self._environment = {**os.environ, **env}
        self._ids = tempfile.TemporaryDirectory(prefix="raymoe-containers-")
        self._network = "none"  # a name space with a loopback and nothing else

    def start(self, name: str, command: Sequence[str]) -> None:
        """Run a container in the background; the first one's loopback is everybody's."""
        self._run("--detach", name=name, command=command)
        if self._network == "none":
            self._network = f"container:{self._id(name)}"

    def once(self, name: str, command: Sequence[str], *, timeout: float) -> str:
        """What a container prints that runs to its end.

        Raises:
            AssertionError: it ends with another exit code than 0.
            subprocess.TimeoutExpired: it does not end in time.
        """
        return self._run(name=name, command=command, timeout=timeout)

    def execute(self, name: str, command: Sequence[str], *, timeout: float = 120) -> str:
        """What a command prints in a container that runs.

        Raises:
            AssertionError: it ends with another exit code than 0.
            subprocess.TimeoutExpired: it does not end in time.
        """
        return self._call(["exec", self._id(name), *command], timeout)

    def wait(self, what: str, condition: Callable[[], bool], *, timeout: float) -> None:
        """Ask until something is so; an AssertionError of the question itself is a no.

        Raises:
            TimeoutError: it is not so in time; with the reason of the last no, and the containers' logs.
        """
        deadline, reason = time.monotonic() + timeout, ""
        while True:
            try:
                if condition():
                    return
            except AssertionError as error:
                reason = str(error)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout:g} s\n{reason}\n{self.logs()}")
            time.sleep(0.5)

    def logs(self) -> str:
        """The last lines that each container wrote."""
        said = []
        for file in sorted(Path(self._ids.name).iterdir()):
            command = [*self._podman, "logs", "--tail", "20", file.read_text()]
            done = subprocess.run(command, capture_output=True, text=True)
            said.append(f"--- {file.name}\n{done.stdout}{done.stderr}")
        return "\n".join(said)

    def remove(self) -> None:
        """Remove all, by their ids; the first one last, whose loopback the others are on."""
        files = sorted(Path(self._ids.name).iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files:
            command = [*self._podman, "rm", "--force", "--ignore", "--time", "5", file.read_text()]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{file.name} cannot be removed: {done.stderr.strip()}", file=sys.stderr)
        self._ids.cleanup()

    def _id(self, name: str) -> str:
        return (Path(self._ids.name) / name).read_text()

    def _run(self, *options: str, name: str, command: Sequence[str], timeout: float = 60) -> str:
        # podman writes the id before the container starts: one that is interrupted here is removed too.
        where = ["--cidfile", str(Path(self._ids.name) / name), "--network", self._network]
        limits = [part for limit in _limits() for part in ("--ulimit", limit)]
        run = ["run", *options, *where, *limits, *_SECURITY, *self._volumes, *self._env, self._image]
        return self._call([*run, *command], timeout)

    def _call(self, command: Sequence[str], timeout: float) -> str:
        done = subprocess.run(
            [*self._podman, *command], capture_output=True, text=True, timeout=timeout, env=self._environment
        )
        told = f"{' '.join(command[-12:])}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, told
        return done.stdout


def _limits() -> list[str]:
    """Limits of processes and open files that this process may set."""
    found = []
    for name, (which, most) in _MOST.items():
        hard = resource.getrlimit(which)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(hard, most)
        found.append(f"{name}={limit}:{limit}")
    return found
