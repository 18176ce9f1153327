"""The private directory of a front, and what a front that is started again finds in it."""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import ResourceError

_STATE = "state.json"
_LONGEST_PATH = 90  # of the directory, so that the name of a Unix socket in it is not too long
_PORTS = range(20000, 30000)  # below those that the kernel gives to outgoing connections
_TRIES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontState:
    """What the processes behind a front know of it, the same when it is started again.

    Attributes:
        token: What the port for metrics adds to its requests.
        grpc_port: Port of the loopback on which the interface's processes serve gRPC.
    """

    token: str
    grpc_port: int


def front_folder(session: Path, application: str) -> Path:
    """The directory of an application's front, which its owner alone can enter.

    Args:
        session: Directory of the Ray session.
        application: Name of the Serve application.
    """
    folder = session / "raymoe" / application
    if len(str(folder)) > _LONGEST_PATH:
        return Path(tempfile.mkdtemp(prefix="raymoe-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def front_state(folder: Path) -> FrontState:
    """The state in a front's directory, made if there is none."""
    file = folder / _STATE
    try:
        return FrontState(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        made = FrontState(token=secrets.token_urlsafe(32), grpc_port=free_internal_port())
    new = folder / f"{_STATE}.new"
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as text:
        json.dump(asdict(made), text)
    new.replace(file)
    return made


def free_internal_port() -> int:
    """A free port of the loopback that no outgoing connection takes meanwhile.

    Raises:
        ResourceError: None is found.
    """
    source = random.SystemRandom()
    for _ in range(_TRIES):
        port = source.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ResourceError(
        f"no port of the loopback between {_PORTS[0]} and {_PORTS[-1]} is free; end what uses them"
    )


__all__ = ["FrontState", "free_internal_port", "front_folder", "front_state"]
