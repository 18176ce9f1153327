"""The addresses that a served model listens on, checked before anything starts."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from errors import ConfigError, ResourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenAddress:
    """Where a served model listens.

    Attributes:
        host: Network interface for HTTP.
        port: Port for HTTP.
        grpc_port: Port for gRPC; None switches it off.
    """

    host: str
    port: int
    grpc_port: int | None = None

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

    def check_free(self) -> None:
        """Check that both ports can be listened on; Serve's proxies would fail late, or silently.

        Raises:
            ConfigError: Both are the same, or the interface is not one of this machine.
            ResourceError: One is in use.
        """
        if self.port == self.grpc_port:
            raise ConfigError(f"--port and --grpc-port are both {self.port}; choose another for one of them")
        try:
            family, _, _, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--host {self.host} is no network interface ({error}); give an address"
            ) from None
        _try("--port", self.port, family, address)
        if self.grpc_port is not None:
            _try("--grpc-port", self.grpc_port, family, (address[0], self.grpc_port, *address[2:]))


def _try(option: str, port: int, family: int, address: tuple[object, ...]) -> None:
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


__all__ = ["ListenAddress"]
