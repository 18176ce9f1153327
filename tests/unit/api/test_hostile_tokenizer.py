"""A text over which the model's tokenizer takes long, or fails, is a fault of its request alone."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from jobs.data.tokenizer import train_tokenizer
from support.api_server import PROMPT, Served

HOSTILE = "ab" * 40 + "x"
"""A text over which the expression below backtracks until the library gives up."""


def _backtracking() -> tuple[Tokenizer, int]:
    tokenizer, end = train_tokenizer([PROMPT] * 4, 290)
    values = json.loads(tokenizer.to_str())
    values["normalizer"] = {"type": "Replace", "pattern": {"Regex": "((ab)+)+$"}, "content": ""}
    return Tokenizer.from_str(json.dumps(values)), end


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a process", "in this one"])
def test_a_text_that_cannot_be_tokenized_gets_400(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails in this process, where such a tokenizer is not used, is no fault of the server."""
    if where == "in this one":
        monkeypatch.setattr("jobs.api.text_encoder.encodes_linearly", lambda _: True)
    served = Served(tokenizer=_backtracking())
    try:
        refused = served.complete(prompt=HOSTILE)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["message"].startswith("the tokenizer cannot encode the text (")
        assert error["param"] == "prompt"
        answer = served.complete(max_tokens=2)
        assert answer.status_code == 200
        assert answer.json()["usage"]["prompt_tokens"] == len(served.tokenizer.encode(PROMPT).ids)
    finally:
        served.backend.close()
        served.service.close()
