"""Abstract Unix sockets of packets: they have no file, and end with their processes."""

from __future__ import annotations

import os
import secrets
import socket

from channels.framing.accepting import BACKLOG
from errors import ChannelError, ChannelTimeout


def listen() -> tuple[socket.socket, str]:
    """Open a listening socket; the socket and its name."""
    name = f"raymoe-{os.getpid()}-{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + name)
    listener.listen(BACKLOG)
    return listener, name


def dial(name: str, address: str, timeout: float) -> socket.socket:
    """Connect to a listener.

    Args:
        address: The channel's address, for messages.

    Raises:
        ChannelTimeout: The listener does not accept in time.
        ChannelError: No process listens.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout)
        connection.connect("\0" + name)
        connection.settimeout(None)
        return connection
    except TimeoutError as error:
        connection.close()
        raise ChannelTimeout(f"{address} does not accept connections within {timeout} s") from error
    except OSError as error:
        connection.close()
        raise ChannelError(f"no process listens at {address} ({error}); has its process ended?") from error


__all__ = ["dial", "listen"]
