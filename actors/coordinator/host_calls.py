"""Calls to many expert hosts at the same time, each on its own thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from errors import ChannelError, RaymoeError, RemoteError, ResourceError, is_loss

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class HostCalls:
    """A pool of threads that calls expert hosts. Any thread may use it.

    Args:
        name: Prefix of the threads' names.
        threads: Hosts that are called at the same time, at most.
        pool: Carries out the calls; None starts threads.
    """

    def __init__(self, name: str, threads: int, pool: Executor | None = None) -> None:
        self._pool = pool or ThreadPoolExecutor(threads, thread_name_prefix=name)

    def submit(self, call: Callable[..., _T], *arguments: object) -> Future[_T]:
        """Start a call and return without waiting for it.

        Raises:
            ResourceError: The coordinator is being closed.
        """
        try:
            return self._pool.submit(call, *arguments)
        except RuntimeError as error:  # the pool has been shut down
            raise ResourceError("the coordinator has been closed") from error

    def begin(self, call: Callable[..., object], *arguments: object) -> None:
        """Start a call whose result nothing awaits; an error that it raises is logged."""
        try:
            self.submit(call, *arguments).add_done_callback(_log_error)
        except ResourceError:  # being closed: nothing needs the call
            return

    def on_all(self, ids: Iterable[str], what: str, call: Callable[[str], _T]) -> list[_T]:
        """Call every host at the same time and wait for all calls; the results in the order of `ids`.

        Args:
            what: The action, for error messages: "expert host h failed to {what}".

        Raises:
            RaymoeError: One or more hosts failed; see `failed_on`.
        """
        return results(what, [(id, self.submit(call, id)) for id in ids])

    def close(self) -> None:
        """Cancel the calls that have not started, and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _log_error(done: Future[object]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        _log.error("a call to an expert host failed unexpectedly", exc_info=error)


def results(what: str, calls: Iterable[tuple[str, Future[_T]]]) -> list[_T]:
    """Wait for all calls (host id, future) and return their results.

    Raises:
        RaymoeError: One or more hosts failed; see `failed_on`.
    """
    found: list[_T] = []
    errors: list[tuple[str, BaseException]] = []
    for id, one in calls:
        try:
            found.append(one.result())
        except (Exception, CancelledError) as error:
            errors.append((id, error))
    if errors:
        raise failed_on(what, errors) from errors[0][1]
    return found


def failed_on(what: str, errors: list[tuple[str, BaseException]]) -> RaymoeError:
    """One error for the failures of several hosts: a `ChannelError` if any host is lost, else the first's.

    Args:
        errors: (host id, error), one or more.
    """
    text = "; ".join(f"expert host {id} failed to {what}: {error}" for id, error in errors)
    if any(is_loss(error) for _, error in errors):
        return ChannelError(text)
    first = errors[0][1]
    if isinstance(first, RaymoeError) and not isinstance(first, RemoteError):
        return type(first)(text)
    return RaymoeError(text)


__all__ = ["HostCalls", "failed_on", "results"]
