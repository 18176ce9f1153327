"""A stand-in for NCCL between CPUs: a gloo process group for each direction, in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from channels.base import Channel, Server
from channels.collective import channel as collective
from channels.collective import nccl
from channels.collective.rendezvous import Rendezvous

_dist: Any = torch.distributed


class GlooGroup:
    """A group over gloo in place of a `channels.collective.nccl.OneWayGroup`."""

    device = torch.device("cpu")

    def __init__(self, meeting: Rendezvous, rank: int, name: str, interface: str, timeout: float) -> None:
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=interface)]
        options._timeout = timedelta(seconds=timeout)
        self._peer = 1 - rank
        self._group = _dist.ProcessGroupGloo(_dist.PrefixStore(name, meeting), rank, 2, options)

    def send(self, tensor: Tensor) -> Any:
        return self._group.send([tensor], self._peer, 0)

    def receive(self, tensor: Tensor, limit: float, ended: Callable[[], bool]) -> None:
        began = time.monotonic()
        try:
            self._group.recv([tensor], self._peer, 0).wait(timedelta(seconds=limit))
        except RuntimeError:
            if time.monotonic() - began >= limit:
                raise TimeoutError from None
            raise

    def end(self) -> None:
        """gloo's ends with its memory."""


_end: Any = partial(nccl.NcclEnd, make=GlooGroup)


def serve(handler: Callable[..., Any]) -> Server:
    """As `channels.collective.nccl.serve`."""
    return collective.CollectiveServer(handler, end=_end, kind="nccl")


def connect(address: str, *, timeout: float = 30.0) -> Channel:
    """As `channels.collective.nccl.connect`."""
    return collective.connect(address, timeout=timeout, end=_end, kind="nccl")


__all__ = ["GlooGroup", "connect", "serve"]
