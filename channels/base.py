"""The one protocol between a router and an expert host.

A `Channel` is an ordered pipe that one thread uses at a time: `submit` sends a request and returns
at once with a `Ticket`; replies come in the order of the requests. A router opens one channel per
(host, lane), a lane being a thread that runs a microbatch, so nothing needs demultiplexing.

Payloads of a request, by phase (n rows leave for this host, nnz (row, expert) pairs, D hidden):

    INFER, FORWARD   rows [n, D], row_ptr [n + 1] int32, expert [nnz] int32 (global ids), gate [nnz]
                     -> partial [n, D]: the gate-weighted sum over this host's experts
    BACKWARD         d_partial [n, D]
                     -> d_rows [n, D], d_gate [nnz]

FORWARD keeps what BACKWARD of the same key needs; INFER keeps nothing. RELEASE drops what a
FORWARD kept without a backward pass (no payload, no reply tensors).
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
    """Names one call for ever: the same id is the same call, sent again.

    Attributes:
        run: the training run or serving deployment.
        epoch: placement epoch that the router routed with.
        step: optimizer step (training) or engine step (serving).
        microbatch: index within the step, unique over the router's microbatches.
        layer: model layer index, MTP layers counted on after the main ones.
        phase: what is asked.
        router: the caller.
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
        """What FORWARD, BACKWARD and RELEASE of one call share: (run, step, microbatch, layer, router)."""
        return (self.run, self.step, self.microbatch, self.layer, self.router)


class Request(NamedTuple):
    """One call: its id and its payload (layout by phase, see the module's text)."""

    id: RequestId
    tensors: tuple[torch.Tensor, ...] = ()


Handler = Callable[[Request], tuple[torch.Tensor, ...]]
"""What a server calls for each request. A `RaymoeError` raised by it reaches the caller as a
`RemoteError` (`StaleEpoch` stays itself), any other exception likewise with its type and text.
Tensors of the request are valid only until the handler returns, and it must not change what they are
(`requires_grad_`, `resize_`): the next request may come with the same ones. Nor are the reply's changed."""


class Ticket(Protocol):
    """A reply that is on its way."""

    def result(self, timeout: float | None = None) -> tuple[torch.Tensor, ...]:
        """Wait for the reply (seconds; None waits for ever) and return its tensors, owned by the caller.

        Raises:
            ChannelTimeout: no reply in time; the channel is closed, open a new one to send again.
            ChannelError: the peer hung up.
            RemoteError: the peer answered with an error.
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
    """How a router reaches one expert host."""

    def submit(self, request: Request) -> Ticket:
        """Send a request without waiting for the reply, until which its tensors must stay as they are."""
        ...

    def takes(self, device: torch.device) -> bool:
        """Whether requests may hold tensors of a device, and the replies to these do; others are copied."""
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
        """Whoever waits on this channel, or uses it from now on, has a `ChannelError` that says why.

        Any thread; what belongs to the channel is freed by its user's `close`.
        """
        ...

    def close(self) -> None:
        """Hang up; tickets that are out raise `ChannelError`. Closing twice is fine."""
        ...


class Server(Protocol):
    """The host's end of a kind of channel."""

    @property
    def address(self) -> str:
        """What `connect` takes, e.g. `shm:…`, `grpc:127.0.0.1:41234`."""
        ...

    def close(self) -> None:
        """Stop accepting, hang up on every caller, join every thread."""
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
