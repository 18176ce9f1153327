"""The settings of the front."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import Seconds
from jobs.config.field_errors import Section
from jobs.config.run_config import Size


class FrontConfig(Section):
    """The limits of the front, which hold before Ray Serve reads anything of a request.

    Attributes:
        connections: connections that clients may have open at a time; further ones wait until one closes.
        connections_per_address: connections that one address (of IPv6, a /64) may have open at a time; null
            allows an address half of `connections`.
        header_bytes: bytes of the request line and the header fields together; more get status 400.
        header_count: header fields of a request; more get status 400.
        header_timeout: seconds that a client has to send the header of a request, from the start of the
            connection or the request; then status 408.
        idle_timeout: seconds that a connection without a request stays open; with three quarters of
            `connections` open, a connection is closed after its answer.
        stall_timeout: seconds without progress after which a client that sends a body or reads an answer is
            cut off.
        silence_timeout: seconds that an answer may pause.
        requests_per_minute: requests of one API key, or without keys of one address, in a minute; further
            ones get status 429; null does not limit them.
        body_memory: bytes, 64 MiB at least, that request bodies and their parsing may take at a time in one
            process of the interface; further bodies wait, then get status 503. Those that are still arriving
            may take as much again.
        body_rate: bytes per second that a client has to send of a body, on average after ten seconds; a
            slower one gets status 408.
        tls_certificate: PEM file with the certificate of the HTTP and gRPC ports, and its chain; null serves
            plain text. Changes of the file are followed.
        tls_key: PEM file with the certificate's key; null if it is in the file of the certificate.
    """

    connections: Size = 2048
    connections_per_address: Size | None = None
    header_bytes: Annotated[int, Field(strict=True, ge=2048, le=1 << 20)] = 16384
    header_count: Annotated[int, Field(strict=True, ge=10, le=32767)] = 100
    header_timeout: Seconds = 10.0
    idle_timeout: Seconds = 75.0
    stall_timeout: Seconds = 60.0
    silence_timeout: Seconds = 3600.0
    requests_per_minute: Size | None = None
    body_memory: Annotated[int, Field(strict=True, ge=64 << 20, le=(1 << 31) - 1)] = 256 << 20
    body_rate: Size = 64 << 10
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    @field_validator("tls_certificate", "tls_key")
    @classmethod
    def _whatever_the_working_directory(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.tls_key is not None and self.tls_certificate is None:
            raise ValueError("tls_key: set tls_certificate as well, the certificate of this key")
        return self

    @property
    def per_address(self) -> int:
        """Connections that one address may have open at a time."""
        return self.connections_per_address or max(1, self.connections // 2)


__all__ = ["FrontConfig"]
