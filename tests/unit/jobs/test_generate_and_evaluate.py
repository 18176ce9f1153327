"""`generate` and `eval` on runs and exported models, and the JSON that commands for models print."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from engine.engine import Engine
from engine.few_rows import FewRowsRunner
from errors import DataError
from jobs.checkpoints.loaded_model import load_model
from jobs.cli.app import app
from jobs.tools.convert import export_checkpoint, import_checkpoint
from jobs.tools.evaluate import evaluate, judge
from jobs.tools.generate import continue_tokens, generate
from model.causal_lm import CausalLM
from model.checkpoints.pretrained import save_pretrained
from support.fronted_app import free_port
from support.random_run import CONFIG, TEXTS


def test_greedy_generation_takes_the_likeliest_token_of_a_full_forward(run: Path) -> None:
    model = load_model(run)
    prompt = model.tokenizer.encode("def name").ids
    new, reason = continue_tokens(model, prompt, max_tokens=5, temperature=0.0, seed=0)
    assert reason == "length"
    text = [*prompt, *new]
    with torch.no_grad():
        logits = model.transformer(torch.tensor([text]), experts=model.experts)[0]
    known = model.tokenizer.get_vocab_size()
    assert known < CONFIG.model.vocab_size
    assert new == logits[len(prompt) - 1 : -1, :known].argmax(-1).tolist()


def test_sampling_is_a_function_of_the_seed(run: Path) -> None:
    texts = [generate(run, "def", max_tokens=12, temperature=1.0, seed=seed)["text"] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_generation_ends_at_the_end_of_text_and_at_the_longest_text(run: Path) -> None:
    model = load_model(run)
    longest = CONFIG.model.max_position_embeddings
    new, reason = continue_tokens(model, [1] * (longest - 1), max_tokens=9, temperature=0.0, seed=0)
    assert (len(new), reason) == (1, "length")
    with pytest.raises(DataError, match=f"--prompt has {longest} tokens"):
        continue_tokens(model, [1] * longest, max_tokens=1, temperature=0.0, seed=0)
    first = continue_tokens(model, [5], max_tokens=1, temperature=0.0, seed=0)[0][0]
    ends = replace(model, text=replace(model.text, ends=frozenset({first})))
    assert continue_tokens(ends, [5], max_tokens=9, temperature=0.0, seed=0) == ([], "stop")


def test_the_cache_is_as_long_as_the_text_can_get(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []

    class Observed(Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            rooms.append(self.pool.n_pages * self.pool.page_size)

    monkeypatch.setattr("jobs.tools.generate.Engine", Observed)
    model = load_model(run)
    for prompt, max_tokens in ((10, 54), (10, 55), (10, 10**9)):
        new, _ = continue_tokens(model, [1] * prompt, max_tokens=max_tokens, temperature=1.0, seed=0)
        assert len(new) <= min(max_tokens, CONFIG.model.max_position_embeddings - prompt)
    assert rooms == [64, 128, 128]


@pytest.mark.parametrize(
    ("prompt", "stdin", "said"),
    [
        ("\udcff\udcfe", b"", "--prompt is not UTF-8"),
        ("-", b"def \xff", "--prompt is not UTF-8 (byte 4 of stdin)"),
    ],
)
def test_a_prompt_that_is_not_text_is_refused(run: Path, prompt: str, stdin: bytes, said: str) -> None:
    result = CliRunner().invoke(app, ["generate", str(run), "--prompt", prompt], input=stdin)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {said}")
    assert len(result.stderr.splitlines()) == 1


def test_generate_says_what_it_does_and_what_it_cuts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = CONFIG.model.max_position_embeddings
    command = ["generate", str(run), "--prompt", "def", "--max-tokens"]
    with monkeypatch.context() as first:
        nothing = SimpleNamespace(stats=SimpleNamespace(cache_path=str(tmp_path)))
        first.setattr("engine.few_rows.runner.attend", nothing)
        assert not FewRowsRunner.is_compiled()
    assert generate(run, "def", max_tokens=1)["tokens"] == 1
    assert FewRowsRunner.is_compiled()
    monkeypatch.setattr(FewRowsRunner, "is_compiled", lambda: False)
    cut = CliRunner().invoke(app, [*command, "4000"]).stderr.splitlines()
    assert cut[0] == f"loading {run}"
    assert cut[1].startswith("--max-tokens is cut from 4,000 to ") and f"takes {longest:,} tokens" in cut[1]
    assert cut[2].startswith("compiling the functions that generate, once")
    monkeypatch.setattr(FewRowsRunner, "is_compiled", lambda: True)
    assert CliRunner().invoke(app, [*command, "3"]).stderr.splitlines() == cut[:1]


def test_a_prompt_from_stdin_is_utf_8_whatever_the_locale(run: Path) -> None:
    arguments = ["generate", str(run), "--prompt", "-", "--max-tokens", "1", "--json"]
    result = CliRunner(charset="latin-1").invoke(app, arguments, input="naïve".encode())
    assert json.loads(result.stdout)["prompt"] == "naïve"


def test_evaluation_is_that_of_each_document_alone(run: Path) -> None:
    model = load_model(run)
    texts = TEXTS[:3]
    result = judge(model, texts, sequence_length=100, batch_size=2)
    nats = 0.0
    tokens = 0
    for text in texts:
        ids = [*model.tokenizer.encode(text).ids, model.text.end_of_text]
        with torch.no_grad():
            logits = model.transformer(torch.tensor([ids]), experts=model.experts)[0]
        nats += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
        tokens += len(ids) - 1
    # The rows are cut at 100 tokens, in mid-document: what a token may look back on differs a little.
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(nats / tokens, rel=2e-3)
    bits = (result["loss"] * tokens + 3 * math.log(512)) / math.log(2) / sum(map(len, texts))
    assert result["bits_per_byte"] == pytest.approx(bits)


def test_eval_judges_the_documents_that_the_run_held_out(run: Path, tmp_path: Path) -> None:
    own = evaluate(run)
    assert 1 <= own["documents"] < len(TEXTS)
    notes: list[str] = []
    everything = evaluate(run, str(run / "corpus.jsonl"), note=notes.append)
    assert notes == ["reading 1 file", f"judging {len(TEXTS)} documents"]
    assert everything["documents"] == len(TEXTS)
    assert everything["bytes"] == sum(map(len, TEXTS))
    assert len(own["mtp_acceptance"]) == 1
    export_checkpoint(run, tmp_path / "hf")
    with pytest.raises(DataError, match="give --data"):
        evaluate(tmp_path / "hf")
    assert (
        evaluate(tmp_path / "hf", str(run / "corpus.jsonl"), sequence_length=32)["loss"] == everything["loss"]
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "nope"], "--data: nope does not exist; give a file, a folder or a glob"),
        (["--data", "one.jsonl", "--text-field", "body"], "the field 'body'; set --text-field to text"),
        (["--data", "two.jsonl", "--text-field", "c"], "the field 'c'; set --text-field to one of a, b"),
        (["--data", "bytes.txt"], "is not UTF-8 text (byte 0); convert it with iconv -f ENCODING -t UTF-8"),
    ],
)
def test_eval_names_its_own_options(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "two.jsonl").write_text('{"a": "one", "b": "two"}\n')
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["eval", str(run), *options])
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: --data: ") and last.endswith(said)


def test_the_commands_print_one_json_object(run: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments, key in (
        (["generate", str(run), "--prompt", "def", "--max-tokens", "3"], "text"),
        (["eval", str(run), "--data", str(run / "corpus.jsonl")], "bits_per_byte"),
        (["export", str(run), str(tmp_path / "hf")], "directory"),
        (["import", str(tmp_path / "hf"), str(tmp_path / "back")], "directory"),
    ):
        result = runner.invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        assert key in json.loads(result.stdout)


@pytest.mark.parametrize(
    "shape", [{"n_shared_experts": 0}, {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}], ids=str
)
def test_models_without_shared_or_routed_experts_generate_and_are_evaluated(
    run: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    model = CausalLM(CONFIG.model.model_copy(update=shape))
    save_pretrained(model, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "checkpoints" / "step-00000005" / name, tmp_path)
    assert math.isfinite(evaluate(tmp_path, str(run / "corpus.jsonl"), sequence_length=16)["loss"])
    assert generate(tmp_path, "def", max_tokens=3)["tokens"] > 0
    assert import_checkpoint(tmp_path, tmp_path / "back")["parameters"] == model.config.total_parameters()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # in Ray Serve's own code
def test_a_model_without_routed_experts_is_not_served(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deployment is built around them; the command says so before it starts anything."""
    dense = {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}
    save_pretrained(CausalLM(CONFIG.model.model_copy(update=dense)), tmp_path)
    shutil.copy(run / "checkpoints" / "step-00000005" / "tokenizer.json", tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("jobs.serving.serve.ray_session", None)
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", str(free_port())])
    assert result.exit_code == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "first_k_dense_replace (2) leaves no layer with routed experts" in line
    assert line.endswith("use raymoe generate")
    # Ray Serve's warnings, such as of queue lengths on a busy machine, are not among the command's lines.
    assert not logging.getLogger("ray.serve").isEnabledFor(logging.WARNING)
