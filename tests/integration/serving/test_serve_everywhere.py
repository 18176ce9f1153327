"""`raymoe serve` with any number of hosts and any channel gives the tokens of `transformers`.

A server also withstands a thousand requests that Schemathesis generates.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import schemathesis
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.commands.serve import PROMPT, ServeProcess, running, save_model, tiny_model, tiny_tokenizer
from support.fuzzing import assert_robust

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]
NEW = 64
PROMPTS = [f"{PROMPT} the {'mat and the hat ' * (number % 5)}{'cat'[: number % 4]}" for number in range(20)]


@torch.no_grad()
def by_transformers(directory: Path) -> list[str]:
    """The text that greedy decoding by transformers adds to each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    said = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return said


def by_server(server: ServeProcess) -> list[str]:
    """The texts that the server adds to the prompts, several requests at a time."""

    def one(prompt: str) -> str:
        answer = server.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=NEW, temperature=0, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(one, PROMPTS))


@pytest.mark.parametrize("channel", ["shm", "collective", "grpc"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_texts_are_those_of_transformers(tmp_path: Path, hosts: int, channel: str) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer()[0].get_vocab_size())
    directory = save_model(model, tmp_path / "tiny")
    options = ("--set", f"cluster.expert_hosts={hosts}", "--set", f"cluster.channel={channel}")
    expected = by_transformers(directory)
    assert len(set(expected)) > 10
    with running(model, directory, tmp_path / "serve.log", *options) as server:
        assert len(server.hosts()) == hosts
        assert by_server(server) == expected


def test_a_thousand_requests_that_nobody_would_write(tmp_path: Path) -> None:
    model = tiny_model()
    with running(model, save_model(model, tmp_path / "tiny"), tmp_path / "serve.log") as server:
        before = server.client.completions.create(model="tiny", prompt=PROMPT, temperature=0).choices[0].text
        document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        assert assert_robust(document, 550) >= 1000
        after = server.client.completions.create(model="tiny", prompt=PROMPT, temperature=0).choices[0].text
        assert after == before
