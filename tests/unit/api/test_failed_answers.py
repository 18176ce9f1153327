"""An answer that fails says what failed: by its status before the first chunk, by an event after it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from support.api_server import Served, events


@pytest.mark.parametrize("name", ["engine.acceptance.choose", "jobs.api.logprob_bodies._completion_text"])
def test_the_failure_of_one_request_is_told_whenever_it_comes(
    served: Served, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """`choose` runs in the engine's thread, the other function where answers are made."""
    body = {"max_tokens": 9, "logprobs": 1, "presence_penalty": 0.5}
    whole = served.complete(**body).json()["choices"]
    module, _, attribute = name.rpartition(".")
    target = importlib.import_module(module)
    works, calls, last = getattr(target, attribute), 0, 0

    def fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= last:
            raise ValueError("no such number")
        return works(*args)

    with monkeypatch.context() as patch:
        patch.setattr(target, attribute, fails)
        for first, stream in ((1, False), (1, True), (4, False)):
            last, calls = first, 0
            answer = served.complete(**body, stream=stream)
            assert answer.status_code == 500
            assert "ValueError: no such number" in answer.json()["error"]["message"]
        last, calls = 4, 0
        *chunks, end = events(served.complete(**body, stream=True))
        assert len(chunks) >= 1
        assert end["error"]["code"] == "request_failed"
        assert end["error"]["message"] == "ValueError: no such number"
    assert served.complete(**body).json()["choices"] == whole
