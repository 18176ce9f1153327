"""The interface answers generated and malformed requests in OpenAI's format, without a failure.

Schemathesis generates them from the server's OpenAPI document, and checks the answers against it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis

from jobs.api import build_api
from jobs.api.body_limit import MAX_BYTES
from support.api_server import PROMPT, Served
from support.fuzzing import assert_robust

JSON = {"Content-Type": "application/json"}


def test_every_answer_is_as_the_document_says(served: Served) -> None:
    before = served.complete(max_tokens=8).json()["choices"]
    assert_robust(schemathesis.openapi.from_asgi("/openapi.json", build_api(lambda: served.backend)), 40)
    assert served.complete(max_tokens=8).json()["choices"] == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b'"prompt"',
        b"[" * 200_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "\\ud800": 1}',
    ],
    ids=range(9),
)
def test_what_is_no_request_is_refused(served: Served, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = served.client.post(path, content=body, headers=JSON)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_refused_announced_or_not(served: Served) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(MAX_BYTES // 65536 + 1):
            yield b"x" * 65536

    for content in (b"x" * (MAX_BYTES + 1), parts()):
        answer = served.client.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def test_halves_of_characters_in_a_conversation_are_refused(served: Served) -> None:
    answer = served.client.post(
        "/v1/chat/completions",
        content=json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}),
        headers=JSON,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("header", [b"text/plain", b"application/xml", b"\xff", b""], ids=range(4))
def test_another_content_type_is_no_failure(served: Served, header: bytes) -> None:
    answer = served.client.post(
        "/v1/completions", content=b'{"prompt": "a", "n": 0}', headers={"Content-Type": header}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_another_method_is_told_which_there_is(served: Served) -> None:
    answer = served.client.put("/v1/completions")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST"
    assert "error" in answer.json()


@pytest.mark.parametrize(
    "extreme",
    [
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 5e-324, "temperature": 0.1},
        {"temperature": 1e-300},
        {"top_k": 10**40},
        {"min_tokens": 3, "stop_token_ids": "all"},
        {"logit_bias": "all"},
    ],
    ids=str,
)
def test_extreme_parameters_do_not_stop_the_engine(served: Served, extreme: dict[str, Any]) -> None:
    """An engine step that fails would end all requests with an error, not only the one that caused it."""
    known = range(served.tokenizer.get_vocab_size())
    every = {"stop_token_ids": [*known], "logit_bias": dict.fromkeys(known, -100)}
    body = {name: every[name] if value == "all" else value for name, value in extreme.items()}
    answer = served.complete(prompt=PROMPT, **{"temperature": 1, "max_tokens": 4, "logprobs": 2, **body})
    assert answer.status_code == 200, answer.text


def test_a_null_asks_for_the_default(served: Served) -> None:
    nulls = dict.fromkeys(("n", "top_p", "stream", "presence_penalty", "logit_bias", "echo"))
    assert (
        served.complete(max_tokens=5, **nulls).json()["choices"]
        == (served.complete(max_tokens=5).json()["choices"])
    )
