"""Starts a Ray cluster on this machine for one command, and ends it with all that it leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from errors import ResourceError, UsageError
from jobs.console import own_error
from jobs.fleet.ray_processes import RayProcesses, adjusted
from jobs.fleet.waiting import Tell, busy_note, machine_load, telling

_TRIES = 3
_HOPELESS = (ValueError, TypeError, ImportError, PermissionError)  # another try would end alike


@contextmanager
def started_cluster(
    cpus: int, *, check: Callable[[], object], debug: bool, tell: Tell | None
) -> Iterator[None]:
    """A Ray cluster of this machine alone, which ends with the context.

    Its logs stay if the context fails other than by wrong input, and with `debug`.

    Args:
        cpus: CPUs that the cluster offers.
        check: Called when it has started; raises if it does not suit.
        debug: Show the output of actors.
        tell: Shows what the command waits for.

    Raises:
        ResourceError: The cluster does not start.
    """
    processes = _start(cpus, debug=debug, tell=tell)
    keep = debug
    try:
        check()
    except BaseException:
        _end(processes, keep=keep, tell=tell)
        raise
    try:
        yield
    except Exception as error:
        keep = keep or not isinstance(own_error(error), UsageError)
        raise
    finally:
        _end(processes, keep=keep, tell=tell)


def connect(address: str, *, debug: bool, tell: Tell | None) -> None:
    """Connect to a running cluster, at an address of `running_address`.

    Raises:
        ResourceError: That fails.
    """
    logging.getLogger("ray").setLevel(_level(debug))
    try:
        with adjusted(None, debug=debug), telling(f"the Ray cluster at {address}", tell):
            ray.init(address=address, log_to_driver=debug, logging_level=_level(debug))
    except Exception as error:  # Ray raises bare exceptions
        raise ResourceError(f"no Ray cluster at {address}: {_first_line(error)}; check --address") from error


def _start(cpus: int, *, debug: bool, tell: Tell | None) -> RayProcesses:
    began = time.monotonic()
    for tried in range(1, _TRIES + 1):
        processes = RayProcesses()
        try:
            with adjusted(processes, debug=debug), telling("Ray", tell):
                ray.init(
                    address="local",  # otherwise Ray joins a cluster that runs on this machine
                    num_cpus=cpus,
                    _node_ip_address="127.0.0.1",  # the node's; some of Ray's own ports listen elsewhere
                    include_dashboard=False,
                    log_to_driver=debug,
                    logging_level=_level(debug),
                    configure_logging=True,
                )
            return processes
        except BaseException as error:
            last = tried == _TRIES or not isinstance(error, Exception) or isinstance(error, _HOPELESS)
            keep = last and isinstance(error, Exception)
            _end(processes, keep=keep, tell=tell, grace=0.0)
            if not isinstance(error, Exception):  # Ctrl-C or SIGTERM
                raise
            if last:
                seconds = time.monotonic() - began
                raise ResourceError(_why(error, tried, seconds)) from error
            if tell is not None:
                tell(f"Ray did not start ({_first_line(error)}); trying again ({machine_load()})")
    raise AssertionError("the last try returns or raises")


def _end(processes: RayProcesses, *, keep: bool, tell: Tell | None, grace: float = 5.0) -> None:
    """Disconnect, end the cluster's processes, and delete its folder unless it is kept."""
    family = processes.family()
    try:
        ray.shutdown()
    finally:
        processes.end(family, grace=grace)
        if not keep:
            processes.delete_folder()
        elif tell is not None and processes.folder is not None:
            tell(f"logs of Ray and its actors: {processes.folder / 'logs'}")


def _why(error: Exception, tries: int, seconds: float) -> str:
    often = f" after {tries} tries in {seconds:.0f} s" if tries > 1 and seconds >= 1 else ""
    return f"no Ray cluster on this machine: {_first_line(error)}{often}{busy_note()}; --debug says more"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _level(debug: bool) -> int:
    return logging.INFO if debug else logging.ERROR


__all__ = ["connect", "started_cluster"]
