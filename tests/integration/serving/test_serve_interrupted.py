"""Ctrl-C at `raymoe serve`. This module is the last of its group, since it ends the group's server."""

from __future__ import annotations

import signal

import pytest

from support.commands.serve import ONE_REPLICA, PROMPT, SharedServer

pytestmark = [pytest.mark.timeout(300), pytest.mark.shares("one replica")]


def test_ctrl_c_lets_the_requests_under_way_end(shared_server: SharedServer) -> None:
    server = shared_server.with_settings(ONE_REPLICA, grpc=True)
    stream = server.client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    first = next(iter(stream))
    server.process.send_signal(signal.SIGINT)
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    shared_server.close()  # checks the exit code, and that no process is left
