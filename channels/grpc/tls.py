"""Mutual TLS on every port: who this process is and whom it trusts, read from a directory that may change.

The directory is named by the environment, as Ray names its own certificates, so that it holds for every
process of a node. Both ends show a certificate that the same authority has signed for `NAME`; addresses are
not in it, since hosts come and go. Files that are replaced count from the next handshake on.
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
"""Files of the directory, as a Kubernetes secret of type kubernetes.io/tls has them."""

_TRIES: Final = 5  # at reading files while they are being replaced
_BETWEEN: Final = 0.02
"""Seconds between them: a file is replaced after another."""
_MISTRUST: Final = ("handshake failed", "Socket closed", "Connection reset")  # in gRPC's words
_MAKES: Final = "`raymoe certs` makes such a directory"

Options = Sequence[tuple[str, Any]]
Signature = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process shows, and what it checks others by; PEM.

    Attributes:
        ca: certificates of the authorities.
        certificate: own, with those between it and the authority.
        key: of the certificate.
        signature: of the files.
    """

    ca: bytes
    certificate: bytes
    key: bytes
    signature: Signature


def directory() -> Path | None:
    """Where the files are; None for a job without TLS."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def identity(folder: Path) -> Identity:
    """The files as they are now; a set of which only some have been replaced is read again.

    Raises:
        ConfigError: one is missing or empty, is no PEM, or the key is not the certificate's.
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
    """See that PEM files can be read and belong together; gRPC itself only says that a handshake failed.

    Raises:
        ValueError: naming the file.
    """
    from cryptography import x509  # the work of jobs without TLS begins without it
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
    """What to look at if gRPC says that it could not connect since one end does not trust the other."""
    connecting = details.startswith("failed to connect")  # else a connection ended that had been good
    if not connecting or not any(sign in details for sign in _MISTRUST):
        return ""
    return f"; if it lives, both ends need certificates of one authority, or neither: compare {VARIABLE}"


def listen(server: Any, target: str) -> int:
    """Open a port of a gRPC server, plain or asynchronous: with TLS where there is an identity.

    Raises:
        RuntimeError: the target is taken, or not of this machine.
        ConfigError: from `identity`.
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
            _log.warning("%s; what was shown before is shown further", error)
            return None

    credentials = grpc.dynamic_ssl_server_credentials(
        _shows(first), renewed, require_client_authentication=True
    )
    return int(server.add_secure_port(target, credentials))


def dial(target: str, options: Options) -> grpc.Channel:
    """A gRPC channel; with TLS as the files are now, where there are some.

    Raises:
        ConfigError: from `identity`.
    """
    folder = directory()
    if folder is None or target.startswith("unix"):
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, _trusts(identity(folder)), options=_named(options))


def dial_async(target: str, options: Options) -> grpc.aio.Channel:
    """The same for asyncio."""
    folder = directory()
    if folder is None or target.startswith("unix"):
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, _trusts(identity(folder)), options=_named(options))


def lasting(target: str, options: Options) -> grpc.Channel:
    """A channel that is kept for long: what is called after files have been replaced shows the new ones."""
    if directory() is None:
        return dial(target, options)
    return Renewing(lambda: dial(target, options), _current)


class Renewing(grpc.Channel):
    """Stands for the newest of several channels; those before end with it, as calls may be under way there.

    Args:
        open: makes a channel.
        state: makes a new one necessary when it changes; None where it is not known at the moment.
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
            self._seen = state  # looked at once: the next change is that of the file that does not fit yet
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
    # The third for a file that could not be read at first and was given to us since.
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
