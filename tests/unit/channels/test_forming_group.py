"""A process group of the collective channel whose other end stops while it forms."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest

from channels.collective import channel as collective
from channels.collective.rendezvous import Rendezvous
from errors import ChannelError

pytestmark = pytest.mark.slow


def _host(pipe: Connection, name: str, nth: int) -> None:
    """A server whose process stops right after so many operations of the rendezvous."""
    original: Any = getattr(Rendezvous, name)
    calls = 0

    def counted(self: Rendezvous, *given: Any) -> Any:
        nonlocal calls
        found = original(self, *given)
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGSTOP)
        return found

    setattr(Rendezvous, name, counted)
    pipe.send(collective.serve(lambda request: request.tensors).address)
    pipe.recv()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "nth"), [("set", 1), ("get", 1), ("get", 4)])
def test_a_host_that_stops_while_the_group_forms_is_not_waited_for(name: str, nth: int) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    host = context.Process(target=_host, args=(theirs, name, nth), daemon=True)
    host.start()
    done = threading.Event()

    def connect() -> None:
        with suppress(ChannelError):  # or the group had formed before the host stopped
            collective.connect(address, timeout=2.0).close()
        done.set()

    try:
        address = ours.recv()
        threading.Thread(target=connect, daemon=True).start()
        assert done.wait(20)  # seconds: ten times the timeout
    finally:
        host.kill()
        host.join()
