"""Weights change under running requests: the versions that answers name, and refused checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.weights import TrunkWeights
from errors import ResourceError
from jobs.data.tokenizer import save_tokenizer, train_tokenizer
from jobs.serving import served_model
from jobs.serving.config import ServeConfig
from jobs.serving.replica.replica_weights import load_beside
from jobs.serving.served_model import ModelShape, model_name
from model.causal_lm import CausalLM
from model.checkpoints.pretrained import save_pretrained
from support.api_server import PROMPT, Served, events

LOCAL = ServeConfig.from_dict({"cluster": {"expert_hosts": 0}})


def another(served: Served) -> CausalLM:
    torch.manual_seed(9)
    config = served.engine._runner.weights.config
    model = CausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def test_each_chunk_says_which_weights_computed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    try:
        model, step, count = another(served), served.engine.step, 0
        trunk = TrunkWeights.of(model.trunk)

        def change() -> None:
            served.engine.replace(trunk, model.experts)

        def stepping() -> object:
            nonlocal count
            count += 1
            if count == 3:
                served.service.exchange(change, "v2")
            return step()

        monkeypatch.setattr(served.engine, "step", stepping)
        body = {"max_tokens": 20, "ignore_eos": True}
        *chunks, last, _ = events(
            served.complete(stream=True, stream_options={"include_usage": True}, **body)
        )
        versions = [chunk["system_fingerprint"] for chunk in chunks]
        assert versions == sorted(versions)
        assert set(versions) == {"v1", "v2"}
        assert last["system_fingerprint"] == "v2"
        assert last["usage"]["completion_tokens"] == 20
        count = -1000
        whole = served.complete(**body).json()
        assert whole["system_fingerprint"] == "v2"
        assert served.client.get("/v1/models").json()["data"][0]["version"] == "v2"
        ids = served.tokenizer.encode(PROMPT).ids
        start, known = len(ids), served.tokenizer.get_vocab_size()
        with torch.no_grad():
            for _ in range(20):
                ids.append(int(model(torch.tensor([ids]))[0, -1, :known].argmax()))
        assert whole["choices"][0]["text"] == served.tokenizer.decode(ids[start:])
    finally:
        served.service.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    served = Served()
    served.service.close()
    path: Path = tmp_path_factory.mktemp("model") / "one"
    save_pretrained(another(served), path)
    save_tokenizer(*train_tokenizer(["the cat sat on the mat and the hat"] * 4, 290), path)
    return path


def changed(**fields: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def other_tokenizer(path: Path) -> None:
    save_tokenizer(*train_tokenizer(["a dog ran over a log in the fog"] * 4, 290), path)


def float64(path: Path) -> None:
    served = Served()
    served.service.close()
    save_pretrained(another(served).double(), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(num_experts_per_tok=1), "num_experts_per_tok is 1, and the served model has 2"),
        (changed(rope_theta=5.0), "rope_theta"),
        (changed(moe_intermediate_size=8), "moe_intermediate_size|shape"),
        (changed(eos_token_id=[1, 5]), r"its end tokens \(eos_token_id\) are \[0, 1, 5\], and .* \[0\]"),
        (other_tokenizer, r"tokenizer\.json differs"),
        (float64, "set serving.dtype"),
        (lambda path: next(path.glob("*.safetensors")).unlink(), "safetensors"),
        (lambda path: (path / "tokenizer.json").unlink(), r"tokenizer\.json"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    directory: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    kind = ModelShape.of(LOCAL, directory)
    kind.refuse_other(ModelShape.of(LOCAL, other), other)
    change(other)
    with pytest.raises(Exception, match=message) as caught:
        kind.refuse_other(ModelShape.of(LOCAL, other), other)
    assert getattr(caught.value, "exit_code", None) == 2
    assert "\n" not in str(caught.value)


def test_how_training_began_may_differ(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    changed(initializer_range=0.5)(other)
    ModelShape.of(LOCAL, directory).refuse_other(ModelShape.of(LOCAL, other), other)


def test_weights_that_there_is_no_memory_for_are_not_loaded(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_beside(LOCAL, directory, experts=True)
    assert loaded.experts is not None
    monkeypatch.setattr(served_model, "free_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="beside those in use"):
        load_beside(LOCAL, directory, experts=True)


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("/runs/demo/checkpoints/step-00000500", "demo"),
        ("/models/mine", "mine"),
        ("/models/step-00000500", "step-00000500"),
        ("/checkpoints/step-00000500", "step-00000500"),
        ("/runs/demo/checkpoints/best", "best"),
    ],
)
def test_a_model_is_named_after_its_run_or_directory(directory: str, name: str) -> None:
    assert model_name(Path(directory)) == name
