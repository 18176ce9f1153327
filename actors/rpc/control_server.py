"""A gRPC server for control calls, and the transport of raymoe's errors over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc

import errors
from channels.grpc import tls
from channels.grpc.failures import last_cause
from channels.grpc.guard import Guard
from channels.grpc.options import MAX_STREAMS, OPTIONS
from errors import ChannelError, ChannelTimeout, RaymoeError, RemoteError, ResourceError, StaleEpoch

_ERROR_TYPE = "raymoe-error"
_MAX_TEXT = 1200  # characters; a status is sent in gRPC's metadata of 8 KiB, at up to six bytes each


class ControlServer:
    """A running gRPC server.

    Args:
        register: Adds the services to the server.
        host: Interface to listen on.
        port: Port to listen on; 0 takes a free one.
        threads: Calls that may block at the same time.

    Attributes:
        address: Address of the server, `grpc:HOST:PORT`.

    Raises:
        ResourceError: The server cannot listen on the interface.
    """

    def __init__(
        self,
        register: Callable[[grpc.Server], None],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        threads: int = 8,
    ) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="control"),
            interceptors=[Guard()],
            options=OPTIONS,
            maximum_concurrent_rpcs=threads + MAX_STREAMS,  # beyond this, calls are refused
        )
        register(self._server)
        try:
            port = tls.listen(self._server, f"{host}:{port}")
        except RuntimeError as error:
            raise ResourceError(
                f"cannot listen on {host}:{port}; cluster.interface has to be an address of this machine, "
                "and its ports free"
            ) from error
        self._server.start()
        self.address = f"grpc:{host}:{port}"

    def close(self) -> None:
        """Stop the server; calls under way are aborted."""
        self._server.stop(grace=None).wait()


def control_channel(address: str) -> grpc.Channel:
    """Open a gRPC channel to a `ControlServer`'s address."""
    return tls.lasting(address.removeprefix("grpc:"), OPTIONS)


@contextmanager
def refusing(context: grpc.ServicerContext) -> Iterator[None]:
    """Context of a servicer's method: errors are sent to the caller with their class and text."""
    try:
        yield
    except Exception as error:
        ours = isinstance(error, RaymoeError)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        context.set_trailing_metadata(((_ERROR_TYPE, type(error).__name__ if ours else "RemoteError"),))
        context.abort(grpc.StatusCode.INTERNAL, text[:_MAX_TEXT])


def not_served(context: grpc.ServicerContext) -> NoReturn:
    """Refuse a method of a .proto file that this process does not serve."""
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "this process does not serve this call")
    raise AssertionError  # abort has raised


@contextmanager
def raising(peer: str) -> Iterator[None]:
    """Context of a stub's call: raises errors of the servicer with their class, others as `ChannelError`."""
    try:
        yield
    except grpc.RpcError as error:
        metadata = {item.key: item.value for item in error.trailing_metadata() or ()}
        text = f"{peer}: {error.details()}"
        kind: Any = metadata.get(_ERROR_TYPE)
        if kind is not None:
            known = getattr(errors, kind, RemoteError)
            raise (RemoteError if known is StaleEpoch else known)(text) from None
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ChannelTimeout(f"{peer} did not answer in time") from None
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise ChannelError(f"{peer} has more calls than it takes: {error.details()}") from None
        details = str(error.details())
        why = last_cause(details) or error.code().name
        raise ChannelError(f"{peer} cannot be reached ({why}){tls.mistrust(details)}") from None
    except ValueError as error:
        if "closed channel" not in str(error):
            raise
        # gRPC says this of a channel that this client has closed.
        raise ChannelError(f"{peer} has been given up") from None


__all__ = ["ControlServer", "control_channel", "not_served", "raising", "refusing"]
