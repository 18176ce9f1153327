"""Ctrl-C at `raymoe serve`. This module is the last of its group, since it ends the group's server."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from support.commands.serve import KEY, ONE_REPLICA, PROMPT, ServeProcess, SharedServer

pytestmark = [pytest.mark.timeout(300), pytest.mark.shares("one replica")]


def answers(server: ServeProcess, path: str) -> Iterator[tuple[int, str | None, str]]:
    """Status, Retry-After and text of answers to requests, one after the other, until the port is closed."""
    while True:
        request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {KEY}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                yield answer.status, None, answer.read().decode()
        except urllib.error.HTTPError as error:
            yield error.code, error.headers["Retry-After"], error.read().decode()
        except OSError:  # refused, or cut off by the end of the listener
            return


def test_ctrl_c_lets_the_requests_under_way_end_and_refuses_others(shared_server: SharedServer) -> None:
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
    heard: dict[str, list[tuple[int, str | None, str]]] = {"/health": [], "/v1/models": []}
    threads = [
        threading.Thread(target=lambda path=path: heard[path].extend(answers(server, path)), daemon=True)
        for path in heard
    ]
    for thread in threads:
        thread.start()
    server.process.send_signal(signal.SIGINT)
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    shared_server.close()  # checks the exit code, and that no process is left
    for thread in threads:
        thread.join()
    for path, found in heard.items():
        assert {status for status, _, _ in found} <= {200, 503}, path
        refused = [(after, text) for status, after, text in found if status == 503]
        assert refused, path
        for after, _ in refused:
            assert after is not None and int(after) >= 1
        codes = [json.loads(text)["error"]["code"] for _, text in refused]
        assert codes[0] == "shutting_down"  # by the interface; once that has ended, by the front
        assert set(codes) <= {"shutting_down", "unavailable"}
