"""The interface around generation: API keys, HEAD, failures of chat templates, the event loop, shutdown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs.api.api_keys import ApiKeys
from jobs.chat.chat_renderer import ChatRenderer
from jobs.chat.chat_template import ChatTemplate
from jobs.chat.rendering_process import RenderLimits
from support.api_server import Served

KEY = "secret-of-16-and-more"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (None, 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        (f"BEARER  {KEY} ", 200),
        ("Bearer schl\u00fcssel".encode(), 401),
    ],
)
def test_a_key_is_a_bearer_token_in_any_case(served: Served, sent: Any, status: int) -> None:
    backend = served.backend
    before, backend.keys = backend.keys, ApiKeys(["another-of-16-and-more", KEY])
    try:
        answer = served.client.get("/v1/models", headers={} if sent is None else {"Authorization": sent})
    finally:
        backend.keys = before
    assert answer.status_code == status
    if status == 401:  # RFC 9110, section 15.5.2
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/", "/v1/models/tiny"])
def test_head_is_get_without_a_body(served: Served, path: str) -> None:
    answer, whole = served.client.head(path), served.client.get(path)
    assert answer.status_code == whole.status_code == 200
    assert answer.content == b""
    assert answer.headers["Content-Type"] == whole.headers["Content-Type"]
    assert "Content-Length" in answer.headers
    assert served.client.put(path).headers["Allow"] == "GET, HEAD"


def test_the_list_of_models_has_two_spellings_and_what_takes_post_alone_no_head(served: Served) -> None:
    assert served.client.get("/v1/models/").json() == served.client.get("/v1/models").json()
    assert served.client.head("/v1/completions").status_code == 405
    assert served.client.head("/v1/models/other").status_code == 404


def test_every_failure_of_a_chat_template_is_the_clients_400(served: Served) -> None:
    """Streams beside it are not touched: the failures take place in a process of their own."""
    source = (
        "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{% for call in messages[0].tool_calls %}{% endfor %}"
        "{{ 1 / (messages|length - 1) }}"
    )
    before = served.backend.chat
    served.backend.chat = ChatRenderer(ChatTemplate(source=source), limits=RenderLimits(cpu_seconds=0.2))
    try:
        for content, calls, told in (("loop", None, "CPU"), ("a", 5, "iterable"), ("a", [{}], "Zero")):
            message = {"role": "user", "content": content, "tool_calls": calls}
            for stream in (False, True):
                answer = served.chat(messages=[message], stream=stream)
                assert answer.status_code == 400
                error = answer.json()["error"]
                assert error["param"] == "messages"
                assert told in error["message"]
    finally:
        served.backend.chat.close()
        served.backend.chat = before
    deep: Any = "a"
    for _ in range(900):
        deep = [deep]
    answer = served.chat(messages=[{"role": "user", "content": "a", "extra": deep}])
    assert answer.status_code in (200, 400)


def test_a_long_text_is_tokenized_while_the_event_loop_goes_on(served: Served) -> None:
    backend = served.backend
    before, backend.longest = backend.longest, 1 << 20
    text = "the hat sat on a mat and the cat " * 3000

    async def count() -> int:
        encoding = asyncio.create_task(backend.encode(text, "prompt", add_special_tokens=True))
        rounds = 0
        while not encoding.done():
            await asyncio.sleep(0)
            rounds += 1
        assert await encoding == served.tokenizer.encode(text).ids
        return rounds

    try:
        # If the tokenizer kept Python's lock, a few rounds would pass before and after its work.
        assert asyncio.run(count()) > 100
    finally:
        backend.longest = before


def test_requests_that_come_during_the_end_are_refused_and_those_under_way_answered(served: Served) -> None:
    admission = served.backend.admission

    async def drained_after() -> None:
        waiting = asyncio.create_task(admission.drained())
        with admission.request():
            admission.close()
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting

    asyncio.run(drained_after())
    try:
        for answer in (served.complete(), served.chat(), *map(served.client.get, ("/health", "/v1/models"))):
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["code"] == "shutting_down"
        assert served.client.get("/metrics").status_code == 200
    finally:
        admission.closed = False
