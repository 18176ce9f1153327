"""Every error that raymoe raises on purpose.

    RaymoeError
    ├── UsageError            the user's input is wrong: exit code 2
    │   ├── ConfigError       a field of the configuration
    │   ├── DataError         a corpus, a file or a tokenizer
    │   └── CheckpointError   a checkpoint that is missing, damaged or of another shape
    ├── ResourceError         the cluster lacks what the configuration asks for
    │   ├── ChangeUnderWay    another change of the number of expert hosts has not ended
    │   ├── HostsChanged      expert hosts joined or left during a change of weights
    │   └── QueueFull         the queue of waiting requests is full
    ├── RequestFailed         a generation request failed for a reason of its own
    ├── Interrupted           a training step is given up; the worker has to join the run again
    ├── WorkersLost           another worker's process has ended
    ├── ChannelError          a peer is unreachable, or closed the connection
    │   ├── ChannelTimeout    no reply before the deadline
    │   └── RemoteError       the peer replied with an error
    │       └── StaleEpoch    the peer holds another placement epoch than the request names
    └── ProtocolError         a malformed frame, or a call out of order

Each message names what was wrong, where, and what to do about it.
"""

from __future__ import annotations

import reprlib
from typing import Final


class RaymoeError(Exception):
    """Base of every deliberate error; ends a command with exit code 1."""

    exit_code = 1


class UsageError(RaymoeError):
    """The user's input is wrong; ends a command with exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A field of the configuration is unknown, has a wrong type, or conflicts with another field."""


class DataError(UsageError):
    """A corpus, a file or a tokenizer is missing, empty or unreadable."""


class CheckpointError(UsageError):
    """A checkpoint is missing or damaged, or its shape differs from the configuration's."""


class ResourceError(RaymoeError):
    """The cluster lacks what the configuration asks for."""


class ChangeUnderWay(ResourceError):
    """Another change of the number of expert hosts has not ended; the request can be tried again."""


class HostsChanged(ResourceError):
    """Expert hosts joined or left during a change of weights; the change can be tried again."""


class Interrupted(RaymoeError):
    """A training step is given up because something that it needs is lost; the worker joins the run again."""


class QueueFull(ResourceError):
    """The queue of waiting requests is full; the request can be sent again later."""


class RequestFailed(RaymoeError):
    """A generation request failed for a reason of its own; at another replica it would fail, too."""


class WorkersLost(RaymoeError):
    """Another worker's process has ended, and with it the process group that sums gradients."""


class ChannelError(RaymoeError):
    """A peer could not be reached, or closed the connection during a call."""


class ChannelTimeout(ChannelError):
    """No reply came before the deadline."""


class RemoteError(ChannelError):
    """The peer replied with an error, whose text the message carries."""


class StaleEpoch(RemoteError):
    """The peer holds another placement epoch than the request names.

    Attributes:
        epoch: The peer's placement epoch; fetch its routing table and send the request again.
    """

    def __init__(self, message: str, *, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


class ProtocolError(RaymoeError):
    """A malformed frame, or a call that is out of order."""


_BRIEF: Final = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist, _BRIEF.maxtuple = 3, 4, 6, 6
_BRIEF.maxstring, _BRIEF.maxlong, _BRIEF.maxother = 100, 50, 100
_LONGEST_REASON: Final = 300  # characters


def brief(value: object) -> str:
    """A value from a file of others as part of a message: its `repr`, in one line and cut to a length."""
    return _BRIEF.repr(value)


def shown(text: str, longest: int = 100) -> str:
    """A name from a file of others as part of a message: in one line, cut to a length, without quotes."""
    cut = text if len(text) <= longest else text[:longest] + "…"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in cut)


def reason(error: BaseException) -> str:
    """The text of a library's error as part of a message: in one line and cut to a length."""
    return shown(" ".join(str(error).split()), _LONGEST_REASON) or type(error).__name__


def is_loss(error: BaseException) -> bool:
    """Whether an error means that a peer is unreachable; an error that the peer replied with is none."""
    return isinstance(error, ChannelError) and not isinstance(error, RemoteError)


def gives_way(error: BaseException) -> bool:
    """Whether an error ends the training step, after which the worker joins again, and not the whole run."""
    return is_loss(error) or isinstance(error, Interrupted | StaleEpoch)


def described(error: BaseException) -> str:
    """The text of an error for those who get no traceback: an unforeseen one with its type."""
    return str(error) if isinstance(error, RaymoeError) else f"{type(error).__name__}: {error}"


__all__ = [
    "ChannelError",
    "ChannelTimeout",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HostsChanged",
    "Interrupted",
    "ProtocolError",
    "QueueFull",
    "RaymoeError",
    "RemoteError",
    "RequestFailed",
    "ResourceError",
    "StaleEpoch",
    "UsageError",
    "WorkersLost",
    "brief",
    "described",
    "gives_way",
    "is_loss",
    "reason",
    "shown",
]
