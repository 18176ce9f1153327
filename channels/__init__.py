"""How a router reaches an expert host: in process, over shared memory, torch.distributed or gRPC.

`base` holds the protocol; `connect` opens a channel to an address, its scheme says which kind.
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
