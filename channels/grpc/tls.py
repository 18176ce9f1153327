"""Mutual TLS on every port, with certificates from a directory whose files may be replaced.

An environment variable names the directory, as for Ray's own certificates, so that it holds for every process
of a node. Both ends present a certificate for `NAME` that the same authority has signed; it has no addresses,
since hosts come and go. Replaced files are used from the next handshake on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from errors import ConfigError

_log = logging.getLogger(__name__)

VARIABLE: Final = "RAYMOE_TLS_DIR"
NAME: Final = "raymoe"
CA, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"
"""Names of the files, as in a Kubernetes secret of type kubernetes.io/tls."""

_TRIES: Final = 5  # attempts to read the files while they are being replaced
_BETWEEN: Final = 0.02
"""Seconds between the attempts: the files are replaced one after the other."""
_MISTRUST: Final = ("handshake failed", "Socket closed", "Connection reset")  # texts of gRPC
_MAKES: Final = "`raymoe certs` makes such a directory"

Options = Sequence[tuple[str, Any]]
Signature = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """A process's own certificate, and those that it trusts; PEM.

    Attributes:
        ca: Certificates of the authorities.
        certificate: This process's certificate, with those between it and the authority.
        key: Private key of the certificate.
        signature: Times, inodes and sizes of the files, to detect that they were replaced.
    """

    ca: bytes
    certificate: bytes
    key: bytes
    signature: Signature


def directory() -> Path | None:
    """The directory of the files; None without TLS."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def identity(folder: Path) -> Identity:
    """Read the files; a set of which only some have been replaced is read again.

    Raises:
        ConfigError: A file is missing, empty or not PEM, or the key does not belong to the certificate.
    """
    for last in (*[False] * (_TRIES - 1), True):
        try:
            before = _signature(folder)
            ca, certificate, key = (_read(folder / name) for name in (CA, CERTIFICATE, KEY))
            require_pair(ca, certificate, key)
            if _signature(folder) == before or last:
                break
        except ValueError as error:
            if last:
                raise ConfigError(f"{VARIABLE}: {folder}: {error}; {_MAKES}") from error
        time.sleep(_BETWEEN)
    return Identity(ca, certificate, key, before)


def require_pair(ca: bytes, certificate: bytes, key: bytes) -> None:
    """Check that PEM files can be read and belong together; gRPC itself only reports a failed handshake.

    Raises:
        ValueError: Names the file.
    """
    from cryptography import x509  # imported on use: jobs without TLS do not need it
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    shown: dict[str, object] = {}
    for name, content in ((CA, ca), (CERTIFICATE, certificate)):
        try:
            shown[name] = x509.load_pem_x509_certificates(content)[0].public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ValueError(f"{name} holds no PEM certificate ({error})") from error
    try:
        public = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{KEY} holds no PEM key without a password ({error})") from error
    if public != shown[CERTIFICATE]:
        raise ValueError(f"{KEY} is not the key of {CERTIFICATE}")


def mistrust(details: str) -> str:
    """Advice to append to gRPC's error if one end does not trust the other; empty otherwise."""
    connecting = details.startswith("failed to connect")  # otherwise an established connection ended
    if not connecting or not any(sign in details for sign in _MISTRUST):
        return ""
    return f"; if it lives, both ends need certificates of one authority, or neither: compare {VARIABLE}"


def listen(server: Any, target: str) -> int:
    """Open a port of a gRPC server, synchronous or asynchronous; with TLS if it is configured.

    Raises:
        RuntimeError: The target is taken, or is not an address of this machine.
        ConfigError: See `identity`.
    """
    folder = directory()
    if folder is None or target.startswith("unix"):
        return int(server.add_insecure_port(target))
    first = identity(folder)
    seen: list[object] = [first.signature]

    def renewed() -> Any:
        state = _current()
        if state is None or state == seen[0]:
            return None
        seen[0] = state
        try:
            return _shows(identity(folder))
        except ConfigError as error:
            _log.warning("%s; the previous certificate stays in use", error)
            return None

    credentials = grpc.dynamic_ssl_server_credentials(
        _shows(first), renewed, require_client_authentication=True
    )
    return int(server.add_secure_port(target, credentials))


def dial(target: str, options: Options) -> grpc.Channel:
    """Open a gRPC channel; with TLS if it is configured, by the files as they are now.

    Raises:
        ConfigError: See `identity`.
    """
    folder = directory()
    if folder is None or target.startswith("unix"):
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, _trusts(identity(folder)), options=_named(options))


def dial_async(target: str, options: Options) -> grpc.aio.Channel:
    """Open a gRPC channel for asyncio, see `dial`."""
    folder = directory()
    if folder is None or target.startswith("unix"):
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, _trusts(identity(folder)), options=_named(options))


def lasting(target: str, options: Options) -> grpc.Channel:
    """Open a long-lived channel: calls use the new files after they have been replaced."""
    if directory() is None:
        return dial(target, options)
    return Renewing(lambda: dial(target, options), _current)


class Renewing(grpc.Channel):
    """A channel that delegates to the newest of several; older ones may have calls under way, and close with
    it.

    Args:
        open: Opens a channel.
        state: When its value changes, a new channel is opened; None if the state is not known at the moment.
    """

    def __init__(self, open: Callable[[], grpc.Channel], state: Callable[[], object]) -> None:
        self._open, self._state = open, state
        self._seen = state()
        self._channels = [open()]
        self._closed = False

    def newest(self) -> grpc.Channel:
        """The channel for a new call."""
        state = self._state()
        if state is not None and state != self._seen and not self._closed:
            self._seen = state  # tried once for each change: a file that does not fit yet changes again
            with suppress(ConfigError):
                self._channels.append(self._open())
        return self._channels[-1]

    def subscribe(self, callback: Callable[..., None], try_to_connect: bool = False) -> None:
        self.newest().subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[..., None]) -> None:
        for channel in self._channels:
            channel.unsubscribe(callback)

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._call("unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._call("unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._call("stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._call("stream_stream", arguments, options)

    def close(self) -> None:
        self._closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Renewing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, kind: str, arguments: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
        made: dict[int, Any] = {}

        def call(*values: Any, **named: Any) -> Any:
            channel = self.newest()
            if id(channel) not in made:
                made[id(channel)] = getattr(channel, kind)(*arguments, **options)
            return made[id(channel)](*values, **named)

        return call


def _current() -> object:
    folder = directory()
    try:
        return None if folder is None else _signature(folder)
    except ConfigError:
        return None


def _shows(held: Identity) -> Any:
    return grpc.ssl_server_certificate_configuration([(held.key, held.certificate)], held.ca)


def _trusts(held: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(held.ca, held.key, held.certificate)


def _named(options: Options) -> Options:
    return [*options, ("grpc.ssl_target_name_override", NAME)]


def _read(path: Path) -> bytes:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{VARIABLE}: {path} cannot be read ({error.strerror}); {_MAKES}") from error
    if not found.strip():
        raise ConfigError(f"{VARIABLE}: {path} is empty; {_MAKES}")
    return found


def _signature(folder: Path) -> Signature:
    try:
        stats = [(folder / name).stat() for name in (CA, CERTIFICATE, KEY)]
    except OSError as error:
        raise ConfigError(
            f"{VARIABLE}: {error.filename} cannot be read ({error.strerror}); {_MAKES}"
        ) from error
    # The time of the last status change too, for a file that has become readable since.
    return tuple((one.st_mtime_ns, one.st_ino, one.st_ctime_ns, one.st_size) for one in stats)


__all__ = [
    "CA",
    "CERTIFICATE",
    "KEY",
    "NAME",
    "VARIABLE",
    "Identity",
    "dial",
    "dial_async",
    "lasting",
    "listen",
    "mistrust",
    "require_pair",
]
