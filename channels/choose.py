"""From an address to a channel, and from a host's addresses to the best one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from channels.base import Channel
from channels.locality import machine_id, process_id
from errors import ChannelError, ConfigError

KINDS: Final = ("local", "shm", "collective", "grpc")
# From the nearest on. Rows between ranks are not encrypted: who wants them says so.
_AUTOMATIC: Final = ("local", "shm", "grpc")


def connect(address: str, *, timeout: float = 30.0) -> Channel:
    """Open a channel to a server's address, `<kind>:<rest>`, within `timeout` seconds.

    Raises:
        ConfigError: the address names no known kind.
        ChannelTimeout: nobody answered in time.
        ChannelError: nobody listens there, or it cannot be reached from here.
    """
    kind = address.partition(":")[0]
    # Imported on use: a process that never leaves its machine need not load gRPC.
    if kind == "local":
        import channels.local as local

        return local.connect(address, timeout=timeout)
    if kind == "shm":
        import channels.shm as shm

        return shm.connect(address, timeout=timeout)
    if kind == "grpc":
        import channels.grpc as grpc

        return grpc.connect(address, timeout=timeout)
    if kind == "collective":
        import channels.collective as collective

        return collective.connect(address, timeout=timeout)
    raise ConfigError(
        f"channel address {address!r}: unknown kind {kind!r}; an address starts with one of "
        + ", ".join(f"{known}:" for known in KINDS)
    )


def pick(
    kind: str,
    addresses: Mapping[str, str],
    *,
    same_process: bool | None = None,
    same_machine: bool | None = None,
) -> str:
    """The address to connect to, of those that a host offers (kind -> address).

    `auto` takes the nearest that both ends share: local within a process, shm within a machine, else
    grpc. The two flags are read from the addresses unless they are given.

    Raises:
        ConfigError: `kind` is unknown.
        ChannelError: the host does not offer it, or it cannot be reached that way from here.
    """
    if kind not in ("auto", *KINDS):
        raise ConfigError(f"cluster.channel: unknown kind {kind!r}; use one of auto, {', '.join(KINDS)}")
    if same_process is None:
        same_process = _place(addresses.get("local")) == process_id()
    if same_machine is None:
        same_machine = same_process or _place(addresses.get("shm")) == machine_id()
    reachable = {"local": same_process, "shm": same_machine, "collective": True, "grpc": True}
    offered = ", ".join(sorted(addresses)) or "nothing"
    if kind == "auto":
        for candidate in _AUTOMATIC:
            if candidate in addresses and reachable[candidate]:
                return addresses[candidate]
        raise ChannelError(
            f"no channel reaches this host from here: it offers {offered}; let it serve grpc as well"
        )
    if kind not in addresses:
        raise ChannelError(f"cluster.channel is {kind}, but the host offers {offered}; use auto")
    if not reachable[kind]:
        where = "process" if kind == "local" else "machine (or network namespace)"
        raise ChannelError(f"cluster.channel is {kind}, but the host is in another {where}; use auto or grpc")
    return addresses[kind]


def taken(kind: str, addresses: Mapping[str, str]) -> str:
    """The kinds of channels to a host that callers take, from the nearest on: for people.

    Args:
        kind: as for `pick`.
    """
    if kind != "auto":
        return kind if kind in addresses else "none"
    return "/".join(known for known in _AUTOMATIC if known in addresses and known != "local") or "none"


def _place(address: str | None) -> str | None:
    """The place that a local or shm address names, `<kind>:<place>/<name>`."""
    return None if address is None else address.partition(":")[2].partition("/")[0]


__all__ = ["KINDS", "connect", "pick", "taken"]
