"""Every error that raymoe raises on purpose.

    RaymoeError
    ├── UsageError            what the user gave is wrong: exit code 2
    │   ├── ConfigError       a field of the configuration
    │   ├── DataError         a corpus, a file or a tokenizer
    │   └── CheckpointError   a checkpoint that is missing, damaged or of another shape
    ├── ResourceError         the cluster cannot give what the configuration asks for
    │   ├── HostsChanged      expert hosts came or went in the middle of a change of weights
    │   └── QueueFull         as many requests wait as may; one comes back later
    ├── Interrupted           a training step is given up, to begin again at a common one
    ├── WorkersLost           another worker's process is gone, and all are started anew
    ├── ChannelError          a peer could not be reached, or hung up
    │   ├── ChannelTimeout    no answer before the deadline
    │   └── RemoteError       the peer answered with an error of its own
    │       └── StaleEpoch    the peer holds another placement epoch
    └── ProtocolError         a malformed frame, or a call out of its order

Each message names what was wrong, where, and what to do about it.
"""

from __future__ import annotations


class RaymoeError(Exception):
    """Base of every deliberate error; ends a command with exit code 1."""

    exit_code = 1


class UsageError(RaymoeError):
    """What the user gave is wrong; ends a command with exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A field of the configuration is unknown, of a wrong type, or conflicts with another."""


class DataError(UsageError):
    """A corpus, a file or a tokenizer is missing, empty or unreadable."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or of another shape than the configuration."""


class ResourceError(RaymoeError):
    """The cluster cannot give what the configuration asks for."""


class HostsChanged(ResourceError):
    """Expert hosts came or went in the middle of a change of weights; do it again."""


class Interrupted(RaymoeError):
    """A training step is given up since something that it needs is lost; join the run again."""


class QueueFull(ResourceError):
    """As many requests wait as may: come back later."""


class WorkersLost(RaymoeError):
    """Another worker's process is gone, and with it the group that sums gradients."""


class ChannelError(RaymoeError):
    """A peer could not be reached, or hung up in the middle of a call."""


class ChannelTimeout(ChannelError):
    """No answer came before the deadline."""


class RemoteError(ChannelError):
    """The peer answered with an error of its own; the message carries its text."""


class StaleEpoch(RemoteError):
    """The peer holds another placement epoch than the request.

    Attributes:
        epoch: the peer's placement epoch; fetch its routing table and send again.
    """

    def __init__(self, message: str, *, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


class ProtocolError(RaymoeError):
    """A malformed frame, or a call that is out of its order."""


def is_loss(error: BaseException) -> bool:
    """Whether an error says that a peer is gone or out of reach, and not that it has refused."""
    return isinstance(error, ChannelError) and not isinstance(error, RemoteError)


def gives_way(error: BaseException) -> bool:
    """Whether a training step is given up for an error, to join the run again, and not the run."""
    return is_loss(error) or isinstance(error, Interrupted | StaleEpoch)


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
    "ResourceError",
    "StaleEpoch",
    "UsageError",
    "WorkersLost",
    "gives_way",
    "is_loss",
]
