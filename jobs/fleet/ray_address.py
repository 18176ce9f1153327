"""The address of a running Ray cluster: what `auto` stands for, and whether a cluster answers there.

Ray connects to any address for minutes before it gives up, and its file of the last cluster stays behind when
that cluster is killed. So every address is asked first. Nothing here imports Ray.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import grpc
import psutil

from errors import ConfigError, ResourceError
from jobs.fleet.ray_token import fit_token_mode

_VARIABLE = "RAY_ADDRESS"
"""Ray's own convention for the address of its cluster, set inside `ray job submit`."""

_ANSWER_SECONDS = 10.0
_FLAG = "--gcs-address="
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_TLS = "RAY_USE_TLS"
_SILENT = (
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,  # another gRPC service
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


def named_address(address: str | None) -> str | None:
    """The address that `--address` gives, or else RAY_ADDRESS; None if neither does. Empty ones give none."""
    return address or os.environ.get(_VARIABLE) or None


def running_address(address: str | None) -> str:
    """The address of the running cluster that `address` stands for, after a check that it answers.

    Ray in this process is ready to join it (`fit_token_mode`).

    Args:
        address: HOST:PORT; None and `auto` stand for RAY_ADDRESS, else for the cluster on this machine.
            Addresses of other forms, such as `ray://…`, are returned as they are.

    Raises:
        ConfigError: `auto` could be several.
        ResourceError: There is no such cluster.
    """
    if not address or address == "auto":
        address = named_address(None) or "auto"
    if address != "auto":
        fit_cluster(address)
        return address
    found = local_addresses()
    recorded = _recorded()
    if recorded in found or (recorded is not None and not found):
        found = [recorded]
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} Ray clusters run on this machine: {', '.join(found)}; say which with --address"
        )
    if not found:
        raise ResourceError(
            "no Ray cluster runs on this machine; start a job or a cluster, or name one with --address"
        )
    fit_cluster(found[0])
    return found[0]


def only_address(address: str | None) -> str:
    """The address of the running cluster that a command operates on, which never is one of several.

    Args:
        address: HOST:PORT; None takes RAY_ADDRESS, or without it the only cluster of this machine.

    Raises:
        ConfigError: This machine has several.
        ResourceError: There is no such cluster.
    """
    if named_address(address) is None and len(found := local_addresses()) > 1:
        raise ConfigError(
            f"{len(found)} Ray clusters run on this machine; name one with --address: {', '.join(found)}"
        )
    return running_address(address or None)


def local_addresses() -> list[str]:
    """Addresses of the clusters that have a node on this machine, in order; without asking them."""
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            words = " ".join(process.info["cmdline"] or ()).split()
            found |= {word.removeprefix(_FLAG) for word in words if word.startswith(_FLAG)}
    return sorted(found)


def fit_cluster(address: str) -> None:
    """Check that a cluster answers at an address, and make Ray in this process ready to join it.

    Raises:
        ResourceError: None does.
    """
    fit_token_mode(requires_token(address))


def requires_token(address: str) -> bool | None:
    """Whether the Ray cluster that has to answer at HOST:PORT requires a token.

    None means unknown: addresses of other forms are not asked, and TLS is not spoken.

    Raises:
        ResourceError: Nothing answers there, or something else does.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"no Ray cluster at {address} ({error}); check --address") from None
    if os.environ.get(_TLS, "0").lower() in ("1", "true"):
        return None  # Ray's own certificates are needed for more
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ALIVE, None, None)(b"", timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            # An error of the service itself is the answer of a cluster.
            code = error.code()
            if code in _SILENT:
                raise ResourceError(
                    f"what listens at {address} does not answer as a Ray cluster ({code.name}); check "
                    "--address, and end that cluster if it hangs"
                ) from None
            return bool(code is grpc.StatusCode.UNAUTHENTICATED)
    return False


def temporary_folder() -> Path:
    """The folder in which Ray keeps its sessions, and the address of the cluster that began last."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def _recorded() -> str | None:
    """The address in Ray's file of the cluster that `ray start` began last; None without a file."""
    try:
        text = (temporary_folder() / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text or None


__all__ = [
    "fit_cluster",
    "local_addresses",
    "named_address",
    "only_address",
    "requires_token",
    "running_address",
    "temporary_folder",
]
