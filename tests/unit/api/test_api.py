"""Requests of OpenAI clients and their answers, by the interface over an engine in this process."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from engine.delta import Delta
from engine.params import SamplingParams
from jobs.api.backend import Limits
from support.api_server import PROMPT, Served, events


def test_a_completion_and_its_stream_are_the_same(served: Served) -> None:
    whole = served.complete(max_tokens=12).json()
    assert whole["object"] == "text_completion"
    assert whole["model"] == "tiny"
    assert whole["system_fingerprint"] == "v1"
    assert whole["usage"]["completion_tokens"] == 12
    assert whole["choices"][0]["finish_reason"] == "length"
    *chunks, last, done = events(
        served.complete(max_tokens=12, stream=True, stream_options={"include_usage": True})
    )
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_chat_and_its_stream_are_the_same(served: Served) -> None:
    whole = served.chat(max_completion_tokens=9).json()
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["role"] == "assistant"
    *chunks, done = events(served.chat(max_tokens=9, stream=True))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    said = "".join(delta.get("content", "") for delta in deltas)
    assert said == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_several_prompts_and_choices_are_told_apart(served: Served) -> None:
    ids = served.tokenizer.encode(PROMPT).ids
    alone = served.complete(max_tokens=5, seed=3, temperature=1.0).json()["choices"][0]["text"]
    for prompts in (["the mat", PROMPT], [[5, 6], ids]):
        choices = served.complete(prompt=prompts, n=2, max_tokens=5, seed=3, temperature=1.0).json()[
            "choices"
        ]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert choices[2]["text"] == alone
        assert choices[3]["text"] != alone
    assert (
        served.complete(prompt=ids, max_tokens=5, seed=3, temperature=1.0).json()["choices"][0]["text"]
        == alone
    )


def test_stop_strings_and_tokens_end_a_text_and_are_not_in_it(served: Served) -> None:
    text = served.complete(max_tokens=20).json()["choices"][0]["text"]
    stop = text[7:10]
    for body in ({"stop": stop}, {"stop": ["never said", stop]}):
        choice = served.complete(max_tokens=20, **body).json()["choices"][0]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
        streamed = events(served.complete(max_tokens=20, stream=True, **body))[:-1]
        assert "".join(part["choices"][0]["text"] for part in streamed) == choice["text"]
    tokens = served.complete(max_tokens=20, logprobs=0).json()["choices"][0]["logprobs"]["tokens"]
    end = served.tokenizer.encode(tokens[4]).ids
    if len(end) == 1 and tokens.index(tokens[4]) == 4:
        choice = served.complete(max_tokens=20, stop_token_ids=end).json()["choices"][0]
        assert choice["text"] == joined(tokens[:4])


def test_log_probabilities_in_both_forms_and_with_echo(served: Served) -> None:
    plain = served.complete(max_tokens=4, logprobs=3).json()["choices"][0]
    shown = plain["logprobs"]
    assert joined(shown["tokens"]) == plain["text"]
    assert [max(top.values()) for top in shown["top_logprobs"]] == shown["token_logprobs"]
    echoed = served.complete(max_tokens=4, logprobs=3, echo=True).json()["choices"][0]
    assert echoed["text"] == PROMPT + plain["text"]
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert echoed["logprobs"]["token_logprobs"][-4:] == pytest.approx(shown["token_logprobs"], abs=1e-4)
    assert echoed["logprobs"]["text_offset"][-4] == len(PROMPT)
    prompt_alone = served.complete(max_tokens=0, logprobs=1, echo=True).json()
    assert prompt_alone["choices"][0]["text"] == PROMPT
    assert prompt_alone["usage"]["completion_tokens"] == 0
    content = served.chat(max_tokens=3, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert len(content) == 3
    assert len(content[0]["top_logprobs"]) == 2
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]


def joined(tokens: list[str]) -> str:
    """The text of tokens that the completions format shows, some of them as `bytes:\\xe4`."""
    parts = [
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:")
        else token.encode()
        for token in tokens
    ]
    return b"".join(parts).decode(errors="replace")


def test_a_top_p_of_nothing_leaves_the_likeliest_token(served: Served) -> None:
    greedy = served.complete(max_tokens=9).json()["choices"]
    for seed in (1, 2):
        assert served.complete(max_tokens=9, temperature=2, top_p=0, seed=seed).json()["choices"] == greedy


def test_seeds_of_both_signs_are_all_distinct(served: Served) -> None:
    body = {"max_tokens": 12, "temperature": 2}
    choices = served.complete(**body, seed=-3, n=7).json()["choices"]  # seeds -3 to 3
    assert len({choice["text"] for choice in choices}) == 7
    for seed in (-3, -1, 3):
        assert served.complete(**body, seed=seed).json()["choices"][0]["text"] == choices[seed + 3]["text"]


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"temperature": -1}, "temperature", 400),
        ({"temperature": "hot"}, "temperature", 400),
        ({"top_p": -0.1}, "top_p", 400),
        ({"n": 0}, "n", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_tokens": 1000}, "max_tokens", 400),
        ({"prompt": "the cat " * 60}, "prompt", 400),
        ({"prompt": [9999]}, "prompt[0]", 400),
        ({"prompt": []}, "prompt", 400),
        ({"prompt": None}, "prompt", 400),
        ({"prompt": "\ud800"}, "prompt", 400),
        ({"prompt": ["a", "\udfff"]}, "prompt[1]", 400),
        ({"prompt": "a" * 1_000_000}, "prompt", 400),
        ({"prompt": ["a"] * 17, "n": 64}, "prompt", 400),
        ({"best_of": 3}, "best_of", 400),
        ({"top_p": float("nan")}, "top_p", 400),
        ({"min_p": float("inf")}, "min_p", 400),
        ({"temperature": 10**400}, "temperature", 400),
        ({"seed": 10**30}, "seed", 400),
        ({"stop": "\ud800"}, "stop", 400),
        ({"stop_token_ids": [10**30]}, "stop_token_ids[0]", 400),
        ({"two-words": 1}, "two-words", 400),
        ({"logit_bias": {"5": 1000}}, "logit_bias.5", 400),
        ({"logit_bias": {"299": 1}}, "logit_bias.299", 400),
        ({"stop": [""]}, "stop[0]", 400),
        ({"logprobs": 99}, "logprobs", 400),
        ({"min_tokens": 20, "max_tokens": 2}, "min_tokens", 400),
        ({"colour": "red"}, "colour", 400),
        ({"model": "gpt-4"}, "model", 404),
    ],
)
def test_a_wrong_parameter_is_named(
    served: Served, body: dict[str, Any], param: str | None, status: int
) -> None:
    for stream in (False, True):
        # Not the client's `json`, which refuses NaN.
        text = json.dumps({"prompt": PROMPT, "max_tokens": 4, **body, "stream": stream})
        response = served.client.post(
            "/v1/completions", content=text, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["param"] == param, error
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code"}


def test_what_is_no_request_is_refused(served: Served) -> None:
    post = served.client.post
    broken = post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400
    assert broken.json()["error"]["code"] == "invalid_json"
    bare = post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert bare.status_code == 400
    assert "Content-Type: application/json" in bare.json()["error"]["message"]
    nested = served.complete(stream=True, stream_options={"usage": True}).json()["error"]
    assert nested["param"] == "stream_options.usage"
    assert served.client.get("/nowhere").status_code == 404
    assert "error" in served.client.get("/v1/completions").json()
    assert served.chat(messages=[]).json()["error"]["param"] == "messages"
    assert served.chat(top_logprobs=2).status_code == 400


def test_models_health_and_metrics(served: Served) -> None:
    assert served.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert served.client.get("/v1/models/tiny").json()["max_model_len"] == 64
    assert served.client.get("/v1/models/other").status_code == 404
    assert served.client.get("/health").status_code == 200
    served.unwell = "expert host host-1 is gone"
    try:
        answer = served.client.get("/health")
        assert answer.status_code == 503
        assert "host-1" in answer.json()["error"]["message"]
    finally:
        served.unwell = None
    served.complete(max_tokens=4)
    text = served.client.get("/metrics").text
    for name in ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_bucket"):
        assert f"raymoe_{name}" in text
    assert 'raymoe_request_success_total{finished_reason="length",model_name="tiny"}' in text
    assert 'raymoe_expert_hosts_wanted{model_name="tiny"} 3.0' in text
    assert "raymoe_expert_balancedness{" not in text  # not known yet


def test_keys_and_a_full_queue() -> None:
    served = Served(Limits(max_queue=0), keys=["secret-of-16-and-more"])
    try:
        assert served.complete().status_code == 401
        served.client.headers["Authorization"] = "Bearer wrong"
        assert served.complete().json()["error"]["code"] == "invalid_api_key"
        served.client.headers["Authorization"] = "Bearer secret-of-16-and-more"
        assert served.client.get("/v1/models").status_code == 200
        answer = served.complete()
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert served.client.get("/health").status_code == 200
    finally:
        served.service.close()


def test_a_failure_of_the_engine_is_an_error_and_never_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    try:
        step, count = served.engine.step, 0

        def failing() -> Any:
            nonlocal count
            count += 1
            if count == 4:
                raise RuntimeError("an expert host is gone")
            return step()

        monkeypatch.setattr(served.engine, "step", failing)
        *_, last = events(served.complete(max_tokens=30, stream=True))
        assert "an expert host is gone" in last["error"]["message"]
        count = 2
        answer = served.complete(max_tokens=30)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_failed"
        assert served.complete(max_tokens=3).status_code == 200
        assert served.engine.pool.held == 0
    finally:
        served.service.close()


def test_who_goes_away_before_the_engine_has_the_request_stops_nobody_else() -> None:
    served = Served()
    try:
        busy = threading.Event()
        served.service.call(busy.wait)
        heard: list[Delta] = []
        request = served.service.submit("gone", [1, 2], SamplingParams(max_tokens=4), heard.append)
        assert request.cancel()
        busy.set()
        assert served.complete(max_tokens=3).status_code == 200
        assert not heard
    finally:
        served.service.close()
