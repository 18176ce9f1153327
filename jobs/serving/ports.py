"""The addresses that a served model listens on, checked before anything starts."""

from __future__ import annotations

import ipaddress
import socket
from typing import Annotated

from pydantic import Field

from errors import ConfigError, ResourceError
from jobs.config.field_errors import Section

Port = Annotated[int, Field(strict=True, ge=1, le=65535)]


class ListenAddress(Section):
    """Where a served model listens.

    Attributes:
        host: Network interface of the ports, on the head node.
        port: Port for HTTP.
        grpc_port: Port for gRPC; null switches it off.
        metrics_port: Port for metrics and health, which needs no API key; null for none.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    grpc_port: Port | None = None
    metrics_port: Port | None = None

    @property
    def loopback(self) -> bool:
        """Whether the interface is that of this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def grpc(self) -> str | None:
        """Host and port for gRPC; None if it is off."""
        if self.grpc_port is None:
            return None
        return f"[{self.host}]:{self.grpc_port}" if ":" in self.host else f"{self.host}:{self.grpc_port}"

    def url(self, shown: str, *, secure: bool) -> str:
        """The URL for HTTP at a host as URLs have it, with TLS or without."""
        return f"{'https' if secure else 'http'}://{shown}:{self.port}"

    def check_free(self) -> None:
        """Check that both ports can be listened on; a server would fail late.

        Raises:
            ConfigError: Both are the same, or the interface is not one of this machine.
            ResourceError: One is in use.
        """
        if self.port == self.grpc_port:
            raise ConfigError(f"--port and --grpc-port are both {self.port}; choose another for one of them")
        check_port("--port", self.host, self.port)
        if self.grpc_port is not None:
            check_port("--grpc-port", self.host, self.grpc_port)


def check_port(option: str, host: str, port: int) -> None:
    """Check that a port of this machine can be listened on.

    Args:
        option: What sets it, for errors.
        host: Network interface.

    Raises:
        ConfigError: The interface is not one of this machine.
        ResourceError: The port is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} is no network interface ({error}); give an address") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections of an earlier server that the kernel still remembers do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise ResourceError(
                f"{option} {port} is not available ({error.strerror}); choose another, or end what uses it"
            ) from None


__all__ = ["ListenAddress", "check_port"]
