"""Fields of requests: neutral values are taken, others are refused, and an error names the field."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs.api.api_errors import ApiError
from jobs.api.backend import Limits
from jobs.api.grpc_generation import generate
from jobs.api.neutral_values import CHAT, COMPLETION
from jobs.api.request_bodies import ChatRequest, CompletionRequest
from protos.generation_pb2 import GenerateRequest, TokenIds
from support.api_server import PROMPT, Served, events

LONGEST = 64
"""Tokens that the served model takes."""

# Defaults and empty values, as OpenAI's reference and vLLM's document them.
BOTH: dict[str, Any] = {
    "metadata": {"session": "5"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "user-1",
    "prompt_cache_key": "k",
    "response_format": {"type": "text"},
    "use_beam_search": False,
    "length_penalty": 1.0,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "priority": 0,
    "logit_bias": {},
    "stop": [],
    "stop_token_ids": [],
    "user": "me",
    "seed": None,
    "stream_options": None,
    "n": 1,
    "best_of": 1,
    "temperature": None,
    "top_p": 1,
    "top_k": -1,
    "bad_words": [],
    "return_token_ids": False,
    "logprobs": False,
    "top_logprobs": 0,
    "echo": False,
    "max_completion_tokens": None,
    # Of one kind of request; clients send them with the other kind, too.
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "auto",
    "modalities": ["text"],
    "reasoning_effort": "none",
    "verbosity": "medium",
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {},
    "documents": [],
}
OF_COMPLETIONS: dict[str, Any] = {**BOTH, "add_special_tokens": True}
OF_CHATS: dict[str, Any] = {**BOTH, "add_special_tokens": False}


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "a", **fields})


def conversation(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **fields})


def test_a_neutral_value_asks_for_what_happens_anyway(served: Served) -> None:
    for name, value in OF_COMPLETIONS.items():
        given = completion(**{name: value})
        asked = given.model_copy(update={"best_of": None, "user": None})
        assert asked.sampling(max_tokens=3, index=0, logprobs=asked.logprobs, echo=asked.echo) == (
            completion().sampling(max_tokens=3, index=0, logprobs=None, echo=False)
        ), name
    for name, value in OF_CHATS.items():
        conversation(**{name: value})
    plain = served.complete(max_tokens=5).json()["choices"]
    assert served.complete(**{**OF_COMPLETIONS, "temperature": 0, "max_tokens": 5}).json()["choices"] == plain
    said = served.chat(max_tokens=5).json()["choices"]
    message = {"role": "user", "content": "the cat", "tool_calls": [], "refusal": None, "name": None}
    answer = served.chat(**{**OF_CHATS, "temperature": 0, "max_tokens": 5, "messages": [message]})
    assert answer.json()["choices"] == said


def test_a_null_is_the_default_everywhere(served: Served) -> None:
    fields = {*CompletionRequest.model_fields, *COMPLETION} - {"prompt"}
    assert completion(**dict.fromkeys(fields)) == completion()
    fields = {*ChatRequest.model_fields, *CHAT} - {"messages"}
    assert conversation(**dict.fromkeys(fields)) == conversation()
    assert completion(logit_bias={"5": None, "6": 1}).logit_bias == {6: 1}
    whole = served.complete(max_tokens=None).json()
    assert whole["usage"]["completion_tokens"] == 16  # OpenAI's default
    options = dict.fromkeys(("include_usage", "continuous_usage_stats", "include_obfuscation"))
    *_, last, done = events(served.complete(max_tokens=3, stream=True, stream_options=options))
    assert done == "[DONE]"
    assert "usage" not in last


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("length_penalty", 0.5),
        ("skip_special_tokens", False),
        ("skip_special_tokens", 1),
        ("use_beam_search", True),
        ("prompt_logprobs", 0),
        ("reasoning_effort", "high"),
        ("continue_final_message", True),
        ("echo", True),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(served: Served, field: str, value: Any) -> None:
    answer = served.chat(**{field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert field in error["message"]


USER = {"role": "user", "content": "a"}
USAGE_IN_CHUNKS = {"continuous_usage_stats": True}
TEXT = {"type": "text", "text": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        ({"prompt": [[1, 2], [3, -4]]}, "prompt[1][1]", "greater than or equal to 0"),
        ({"prompt": [[1], "a"]}, "prompt[1]", "list"),
        ({"prompt": ["a", 1]}, "prompt[1]", "string"),
        ({"prompt": {"text": "a"}}, "prompt", "a string, a list of strings, a list of token ids"),
        ({"prompt": ["ok", "the cat " * 60]}, "prompt[1]", "maximum context length is 64"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": ["x", 5]}, "stop[1]", "string"),
        ({"stop": 5}, "stop", "a string or a list of strings"),
        ({"logit_bias": {"5": 1, "abc": 1}}, "logit_bias.abc", "token id"),
        ({"logit_bias": {"-5": 1}}, "logit_bias.-5", "token id"),
        ({"logit_bias": {"5": "high"}}, "logit_bias.5", "number"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]", "greater than or equal to 0"),
        ({"prompt": [1, 9999]}, "prompt[1]", "is token 9999; ids go from 0 to"),
        ({"prompt": [[1], [2, 9999]], "n": 2}, "prompt[1][1]", "is token 9999; ids go from 0 to"),
        ({"prompt": [[9999]]}, "prompt[0][0]", "is token 9999; ids go from 0 to"),
        ({"stop_token_ids": [1, 9999]}, "stop_token_ids[1]", "is token 9999; ids go from 0 to"),
        ({"logit_bias": {"5": 1, "9999": 1}}, "logit_bias.9999", "is no token; ids go from 0 to"),
        ({"messages": [USER], "logit_bias": {"9999": 1}}, "logit_bias.9999", "is no token"),
        ({"n": True}, "n", "must be a number"),
        ({"logprobs": True}, "logprobs", "must be a number"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        ({"stream_options": {}}, "stream_options", "stream is true"),
        ({"stream": True, "stream_options": USAGE_IN_CHUNKS}, "stream_options.continuous_usage_stats", ""),
        ({"messages": [USER, {"content": "a"}]}, "messages[1].role", "is missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'system'"),
        ({"messages": [{**USER, "content": [TEXT, IMAGE]}]}, "messages[0].content[1].type", "'image_url'"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
        ({"messages": [{**USER, "content": 5}]}, "messages[0].content", "a string or a list of parts"),
        ({"messages": ["a"]}, "messages[0]", "dictionary"),
        ({"messages": None}, "messages", "is missing"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_an_error_names_the_field_down_to_its_index_and_key(
    served: Served, body: dict[str, Any], param: str, told: str
) -> None:
    answer = served.chat(**body) if "messages" in body else served.complete(**body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert told in error["message"]


# LangChain's OpenAI classes look for the code; LiteLLM for one of the phrases, in lower case.
PHRASES = ("this model's maximum context length is", "input tokens exceed the configured limit")


@pytest.mark.parametrize(
    ("chat", "body", "param"),
    [
        (False, {"prompt": [1] * (LONGEST + 1)}, "prompt"),
        (False, {"prompt": [1] * LONGEST, "max_tokens": 1}, "prompt"),
        (False, {"prompt": [1] * 30, "max_tokens": 35}, "max_tokens"),
        (False, {"prompt": "a" * 1_000_000}, "prompt"),
        (False, {"prompt": [1] * (LONGEST + 1), "max_tokens": 0, "echo": True}, "prompt"),
        (True, {"messages": [{"role": "user", "content": "the cat " * 60}]}, "messages"),
        (True, {"max_completion_tokens": 60}, "max_completion_tokens"),
        (True, {"max_tokens": 60}, "max_tokens"),
    ],
    ids=range(8),
)
def test_a_prompt_that_is_too_long_is_told_as_clients_look_for_it(
    served: Served, chat: bool, body: dict[str, Any], param: str
) -> None:
    answer = served.chat(**body) if chat else served.complete(**body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (
        "context_length_exceeded",
        "invalid_request_error",
        param,
    )
    assert any(phrase in error["message"].lower() for phrase in PHRASES)
    assert f"{LONGEST} tokens" in error["message"]


def test_a_configured_limit_is_told_likewise(served: Served) -> None:
    backend = served.backend
    before, backend.limits = backend.limits, Limits(max_prompt=5, max_tokens=7)
    try:
        error = served.complete(prompt=[1] * 6).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert PHRASES[1] in error["message"].lower()
        assert served.complete(prompt=[1] * 5, max_tokens=8).json()["error"]["param"] == "max_tokens"
        assert served.complete(prompt=[1] * 5, max_tokens=7).status_code == 200
    finally:
        backend.limits = before


def test_a_prompt_as_long_as_the_model_takes_can_be_scored(served: Served) -> None:
    ids = [(7 * index) % 200 for index in range(LONGEST)]
    shorter = served.complete(prompt=ids[:-1], max_tokens=0, echo=True, logprobs=1).json()["choices"][0]
    whole = served.complete(prompt=ids, max_tokens=0, echo=True, logprobs=1).json()
    scores = whole["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scores) == LONGEST
    assert scores[:-1] == pytest.approx([None, *shorter["logprobs"]["token_logprobs"][1:]], abs=1e-4)
    assert whole["usage"] == {**whole["usage"], "prompt_tokens": LONGEST, "completion_tokens": 0}
    assert whole["choices"][0]["finish_reason"] == "length"


def test_fields_of_grpc_have_the_same_errors(served: Served) -> None:
    def refused(**fields: Any) -> ApiError:
        async def ask() -> None:
            async for _ in generate(served.backend, GenerateRequest(**fields)):
                pass

        with pytest.raises(ApiError) as caught:
            asyncio.run(ask())
        return caught.value

    assert refused(tokens=TokenIds(ids=[1, -1])).param == "prompt[1]"
    assert refused(text="a", stop=["x"] * 17).param == "stop"
    assert refused(text="a", logit_bias={-5: 1.0}).param == "logit_bias.-5"
    assert refused(tokens=TokenIds(ids=[1] * 65)).code == "context_length_exceeded"
    assert refused(text=PROMPT, max_tokens=100).param == "max_tokens"
    assert refused(tokens=TokenIds(ids=[1, 9999])).param == "prompt[1]"
    assert refused(text="a", logit_bias={9999: 1.0}).param == "logit_bias.9999"
