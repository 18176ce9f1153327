"""The protocol between a router and an expert host.

A `Channel` is an ordered pipe that one thread uses at a time: `submit` sends a request and returns
at once with a `Ticket`; replies come in the order of the requests. A router opens one channel per
(host, lane), a lane being a thread that runs a microbatch, so nothing needs demultiplexing.

Payloads of a request, by phase (n rows leave for this host, nnz (row, expert) pairs, D hidden):

    INFER, FORWARD   rows [n, D], row_ptr [n + 1] int32, expert [nnz] int32 (global ids), gate [nnz]
                     -> partial [n, D]: the gate-weighted sum over this host's experts
    BACKWARD         d_partial [n, D]
                     -> d_rows [n, D], d_gate [nnz]

FORWARD keeps what BACKWARD of the same key needs; INFER keeps nothing. RELEASE drops what a
FORWARD kept without a backward pass; neither its request nor its reply has a payload.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels.constants import FEW_ROWS

Array = npt.NDArray[Any]

MAX_MAILBOX_ROWS: Final = FEW_ROWS
"""Rows of a request that a mailbox has room for."""


class Phase(IntEnum):
    """What a request asks of an expert host."""

    INFER = 0
    FORWARD = 1
    BACKWARD = 2
    RELEASE = 3


class RequestId(NamedTuple):
    """The name of one call: a request with the same id is the same call, sent again.

    Attributes:
        run: The training run or serving deployment.
        epoch: Placement epoch of the routing table.
        step: Optimizer step (training) or engine step (serving).
        microbatch: Index within the step, unique over the router's microbatches.
        layer: Model layer index; MTP layers follow the main ones.
        phase: What is asked.
        router: The caller.
    """

    run: str
    epoch: int
    step: int
    microbatch: int
    layer: int
    phase: Phase
    router: str

    @property
    def key(self) -> tuple[str, int, int, int, str]:
        """The part that FORWARD, BACKWARD and RELEASE share: (run, step, microbatch, layer, router)."""
        return (self.run, self.step, self.microbatch, self.layer, self.router)


class Request(NamedTuple):
    """One call: its id and its payload, whose layout by phase is in the module's docstring."""

    id: RequestId
    tensors: tuple[torch.Tensor, ...] = ()


Handler = Callable[[Request], tuple[torch.Tensor, ...]]
"""Called by a server for each request; returns the tensors of the reply.

An exception of the handler reaches the caller as a `RemoteError` with its type and text; `StaleEpoch` stays a
`StaleEpoch`. Tensors of the request are valid only until the handler returns, and it must not change their
shape or flags (`resize_`, `requires_grad_`): the next request may reuse them. The reply's are not changed."""


class Ticket(Protocol):
    """The reply to one request, which may still be in flight."""

    def result(self, timeout: float | None = None) -> tuple[torch.Tensor, ...]:
        """Wait for the reply and return its tensors, owned by the caller.

        Args:
            timeout: Seconds; None waits without a limit.

        Raises:
            ChannelTimeout: There was no reply in time; the channel is closed, open a new one to send again.
            ChannelError: The peer closed the connection.
            RemoteError: The peer replied with an error.
        """
        ...


class Mailbox(Protocol):
    """Room for one small request of inference and its reply, in memory that the host reads."""

    @property
    def ready(self) -> bool:
        """Whether the host reads this mailbox."""
        ...

    def post(
        self,
        x: Array,
        idx: Array,
        gates: Array,
        host_of: Array,
        host: int,
        call: tuple[int, int, int],
        shift: int = 0,
    ) -> int:
        """Send the rows of x [N, D] that have experts on a host; the last reply must have been collected.

        Args:
            idx, gates: [N, K].
            host_of: [R, E], and which of its values is this host; token n uses row (n + shift) % R.
            call: Epoch, step and layer.

        Returns:
            Rows sent; with none there is nothing to collect.

        Raises:
            ChannelError: The host cannot be woken.
        """
        ...

    def collect(self, out: Array, timeout: float | None) -> bool:
        """Wait for the reply and add its rows to `out` [N, D]; whether the host has answered.

        A refusal adds nothing; the same request over the channel raises the host's error.

        Raises:
            ChannelTimeout: There was no reply within `timeout` seconds (None waits without a limit).
            ChannelError: The host has closed the connection.
        """
        ...


class Channel(Protocol):
    """A connection from a router to one expert host."""

    def submit(self, request: Request) -> Ticket:
        """Send a request without waiting for the reply; its tensors must not change until the reply."""
        ...

    def takes(self, device: torch.device) -> bool:
        """Whether requests, and the replies to them, carry tensors of a device; others are copied."""
        ...

    def open_mailbox(self, width: int, pairs: int, dtype: np.dtype[Any]) -> Mailbox | None:
        """Open a mailbox beside the channel; None if this kind of channel has none.

        Args:
            width: Numbers of a row.
            pairs: Room for (row, expert) pairs.
            dtype: float32 or float64.

        Raises:
            ResourceError: The system gives no memory or descriptor.
            ChannelError: The host has closed the connection.
        """
        ...

    def cut(self, why: str) -> None:
        """End every wait on this channel, and every later use, with a `ChannelError` of this text.

        Any thread; the channel's user frees its resources with `close`.
        """
        ...

    def close(self) -> None:
        """Close the connection; tickets without a reply raise `ChannelError`. May be called twice."""
        ...


class Server(Protocol):
    """The host's end of one kind of channel."""

    @property
    def address(self) -> str:
        """The address for `connect`, e.g. `shm:…`, `grpc:127.0.0.1:41234`."""
        ...

    def close(self) -> None:
        """Stop accepting, close every connection, and join every thread."""
        ...


__all__ = [
    "MAX_MAILBOX_ROWS",
    "Array",
    "Channel",
    "Handler",
    "Mailbox",
    "Phase",
    "Request",
    "RequestId",
    "Server",
    "Ticket",
]
