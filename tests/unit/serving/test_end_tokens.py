"""A trunk replica ends a request at every end token that the files of its model name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.delta import Delta
from engine.params import SamplingParams
from jobs.serving.config import ServeConfig
from jobs.serving.replica.replica import Replica
from jobs.serving.versions import WeightsVersion
from support.foreign_model import change_json, save_foreign_model


def _answer(directory: Path, prompt: list[int], params: SamplingParams) -> tuple[list[int], str | None]:
    config = ServeConfig.from_dict({"cluster": {"expert_hosts": 0}, "serving": {"cache_tokens": 256}})
    version = WeightsVersion(epoch=0, directory=str(directory), name="one")
    replica = Replica(config, version=version, name="trunk", run="run")
    deltas: list[Delta] = []
    try:
        replica.service.submit("a", prompt, params, deltas.append).result(60)
        replica.service.call(lambda: None).result(60)
        while not deltas or deltas[-1].finish_reason is None:
            replica.service.call(lambda: None).result(60)
            assert not any(delta.error for delta in deltas)
    finally:
        replica.close()
    return [token for delta in deltas for token in delta.tokens], deltas[-1].finish_reason


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_replica_ends_a_request_at_an_end_token_of(file: str, tmp_path: Path) -> None:
    directory = save_foreign_model(tmp_path / "model")
    prompt = Tokenizer.from_file(str(directory / "tokenizer.json")).encode("the cat").ids
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    tokens, reason = _answer(directory, prompt, greedy)
    assert (len(tokens), reason) == (6, "length")
    last = next(token for token in tokens[2:] if tokens.index(token) >= 2)
    change_json(directory / file, {"eos_token_id": [2, last]})
    assert _answer(directory, prompt, greedy) == (tokens[: tokens.index(last) + 1], "stop")
