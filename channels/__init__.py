"""Channels from a router to an expert host: in process, over shared memory, torch.distributed or gRPC.

`channels.base` holds the protocols; `channels.choose` opens a channel to an address, whose scheme names the
kind of channel. docs/architecture.md says how to add a channel.
"""

from __future__ import annotations

__all__: list[str] = []
