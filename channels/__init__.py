"""Channels from a router to an expert host: in process, over shared memory, torch.distributed or gRPC.

`base` holds the protocols; `connect` opens a channel to an address, whose scheme names the kind of channel.

How to add a channel:

1. The router's end: subclass `framing.ordered_channel.OrderedChannel`, which keeps the order of requests and
   replies, timeouts and failures, and implement its `_send`, `_receive`, `_disconnect` and `_wake`. Override
   `takes` if tensors of a device need not be copied, and `open_mailbox` if hosts read mailboxes.
   `framing.header` has the text of headers, checked against the payload when it is read.
2. The host's end: subclass `framing.accepting.AcceptingServer` for a listening socket, or implement
   `base.Server`; call the handler by `framing.ordered_channel.call`.
3. Functions `serve(handler, …)` and `connect(address, timeout=…)` in the same module.
4. In `choose`: the scheme in `connect`, its place in `_MADE_OF` (the nearest first), and when it reaches a
host
   in `ways`.
5. The host offers its address in `actors.host.host_server`.
6. The new kind in the lists of `tests/unit/channels/test_channels.py`, `test_channels_hostile.py` and
   `tests/unit/router/test_failover.py`, which hold every channel to the same promises; and in
   `raymoe bench channel`.
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
