"""Channels from a router to an expert host: in process, over shared memory, torch.distributed or gRPC.

`base` holds the protocols; `connect` opens a channel to an address, whose scheme names the kind of channel.

docs/architecture.md says how to add a channel.
"""

from __future__ import annotations

from channels.base import Channel, Handler, Phase, Request, RequestId, Server, Ticket
from channels.choose import connect, reach

__all__ = [
    "Channel",
    "Handler",
    "Phase",
    "Request",
    "RequestId",
    "Server",
    "Ticket",
    "connect",
    "reach",
]
