"""Opens the channel of an address, and chooses among the addresses of a host."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

import torch

from channels.base import Channel
from channels.locality import machine_id, process_id
from errors import ChannelError, ConfigError

_log = logging.getLogger(__name__)

KINDS: Final = ("local", "shm", "collective", "grpc")
# The schemes of each kind, the nearest first: with a GPU at both ends, rows need not leave it. Rows between
# ranks are not encrypted, and gloo is used only where the configuration says so; a host with certificates
# offers none.
_MADE_OF: Final = {
    "auto": ("local", "cuda", "nccl", "shm", "grpc"),
    "local": ("local",),
    "shm": ("cuda", "shm"),
    "collective": ("nccl", "collective"),
    "grpc": ("grpc",),
}

_BETWEEN_GPUS: Final = ("cuda:", "nccl:")
_FORMING: Final = 30.0  # seconds for one of these to form, after which the next way is tried


def connect(address: str, *, timeout: float = 30.0, device: torch.device | None = None) -> Channel:
    """Open a channel to a server's address, `<kind>:<rest>`, within `timeout` seconds.

    Args:
        device: The caller's GPU, if rows stay on GPUs.

    Raises:
        ConfigError: The address names no known kind.
        ChannelTimeout: There was no answer in time.
        ChannelError: No server listens there, or it cannot be reached from here.
    """
    kind = address.partition(":")[0]
    # Imported on use: a process that never leaves its machine need not load gRPC.
    if kind == "local":
        import channels.local as local

        return local.connect(address, timeout=timeout)
    if kind == "shm":
        import channels.shm.channel as shm

        return shm.connect(address, timeout=timeout)
    if kind == "grpc":
        import channels.grpc.channel as grpc

        return grpc.connect(address, timeout=timeout)
    if kind == "collective":
        import channels.collective.channel as collective

        return collective.connect(address, timeout=timeout)
    if kind == "cuda":
        import channels.cuda.channel as cuda

        return cuda.connect(address, timeout=timeout, device=device)
    if kind == "nccl":
        import channels.collective.nccl as nccl

        return nccl.connect(address, timeout=timeout, device=device)
    raise ConfigError(
        f"channel address {address!r}: unknown kind {kind!r}; an address starts with one of "
        + ", ".join(f"{known}:" for known in KINDS)
    )


def reach(kind: str, addresses: Mapping[str, str], *, timeout: float, device: torch.device) -> Channel:
    """Open the nearest channel to a host, see `ways`.

    A channel between GPUs needs more than a network; where it fails, the next one is tried.

    Args:
        timeout: Seconds.
        device: Device of the caller's rows.

    Raises:
        ConfigError, ChannelError: See `ways` and `connect`.
    """
    gpu = None
    if device.type == "cuda":
        from channels.cuda.channel import gpu_place

        gpu = gpu_place(device)
    *others, last = ways(kind, addresses, gpu=gpu)
    for address in others:
        if not address.startswith(_BETWEEN_GPUS):
            return connect(address, timeout=timeout)
        try:
            return connect(address, timeout=min(_FORMING, timeout), device=device)
        except ChannelError as error:
            _log.warning("%s; another way is taken", error)
    return connect(last, timeout=timeout, device=device)


def ways(
    kind: str,
    addresses: Mapping[str, str],
    *,
    gpu: str | None = None,
    same_process: bool | None = None,
    same_machine: bool | None = None,
) -> list[str]:
    """The addresses to connect to, the nearest first, of those that a host offers (kind -> address).

    `auto` chooses by what both ends share: local within a process, cuda within a GPU, nccl between two GPUs,
    shm within a machine, else grpc.

    Args:
        gpu: The caller's GPU, as `channels.cuda.channel.gpu_place` names it; None for a CPU.
        same_process, same_machine: Whether the host shares them with the caller; None reads it from the
            addresses.

    Raises:
        ConfigError: `kind` is unknown.
        ChannelError: The host does not offer this kind, or cannot be reached with it from here.
    """
    if kind not in _MADE_OF:
        raise ConfigError(f"cluster.channel: unknown kind {kind!r}; use one of auto, {', '.join(KINDS)}")
    if same_process is None:
        same_process = _place(addresses.get("local")) == process_id()
    if same_machine is None:
        same_machine = same_process or _place(addresses.get("shm")) == machine_id()
    theirs = _place(addresses.get("cuda"))
    reachable = {
        "local": same_process,
        "cuda": gpu is not None and theirs == gpu,
        # NCCL refuses two ranks on one card, even if their machines' names differ.
        "nccl": gpu is not None and _card(theirs) != _card(gpu),
        "shm": same_machine,
        "collective": True,
        "grpc": True,
    }
    found = [addresses[one] for one in _MADE_OF[kind] if one in addresses and reachable[one]]
    if found:
        return found
    offered = ", ".join(sorted(addresses)) or "nothing"
    if kind == "auto":
        raise ChannelError(
            f"no channel reaches this host from here: it offers {offered}; let it serve grpc as well"
        )
    if kind not in addresses:
        raise ChannelError(f"cluster.channel is {kind}, but the host offers {offered}; use auto")
    where = "process" if kind == "local" else "machine (or network namespace)"
    raise ChannelError(f"cluster.channel is {kind}, but the host is in another {where}; use auto or grpc")


def taken(kind: str, addresses: Mapping[str, str]) -> str:
    """The schemes of channels that callers open to a host, the nearest first, for status reports.

    Args:
        kind: Channel kind, see `ways`.
    """
    return "/".join(one for one in _MADE_OF[kind] if one in addresses and one != "local") or "none"


def _card(place: str | None) -> str:
    """The GPU of a place, `<machine>-<GPU>`."""
    return "" if place is None else place.partition("-")[2]


def _place(address: str | None) -> str | None:
    """The place in a local or shm address, `<kind>:<place>/<name>`."""
    return None if address is None else address.partition(":")[2].partition("/")[0]


__all__ = ["KINDS", "connect", "reach", "taken", "ways"]
