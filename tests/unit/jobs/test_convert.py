"""Export to and import from Hugging Face directories, and `generate` and `eval` on them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from engine.engine import Engine
from errors import CheckpointError, ConfigError, DataError
from jobs.checkpoints.checkpoint_store import TrainingState
from jobs.checkpoints.loaded_model import LoadedModel, load_model
from jobs.cli.main import app
from jobs.config.config_file import load_config
from jobs.config.presets import preset
from jobs.data.tokenizer import save_tokenizer, train_tokenizer
from jobs.tools.convert import _deviation, export_checkpoint, import_checkpoint
from jobs.tools.evaluate import evaluate, judge
from jobs.tools.generate import continue_tokens, generate
from model.causal_lm import CausalLM
from model.checkpoints.fp8 import SCALE_SUFFIX, quantize
from model.checkpoints.pretrained import (
    RandomSource,
    ShardReader,
    save_pretrained,
    write_index,
    write_model_config,
    write_shard,
)

CONFIG = preset("tiny")
TEXTS = [f"def name_{i}(argument):\n    return argument + {i}\n" for i in range(40)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with a checkpoint of random weights."""
    directory = tmp_path_factory.mktemp("run")
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    checkpoint = directory / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    source = RandomSource(CONFIG.model, seed=1)
    trunk = source.trunk()
    for layer in CONFIG.model.moe_layers:
        # Biases that turn choices, so that losing one shows.
        trunk[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = torch.linspace(-0.3, 0.3, 8)
        experts = {}
        for expert in range(CONFIG.model.n_routed_experts):
            w13, w2 = source.expert(layer, expert)
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up = w13.chunk(2)
            experts |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
            experts[f"{prefix}.down_proj.weight"] = w2
        write_shard(checkpoint / f"model-experts-{layer}.safetensors", experts)
    write_shard(checkpoint / "model-trunk.safetensors", trunk)
    write_shard(checkpoint / "optimizer-trunk.safetensors", {"moment": torch.zeros(2)})
    write_index(checkpoint)
    write_model_config(checkpoint, CONFIG.model)
    save_tokenizer(*train_tokenizer(TEXTS, 300), checkpoint)
    values = CONFIG.to_dict()
    values["data"] |= {"path": str(corpus), "validation_fraction": 0.2}
    state = TrainingState(step=5, bias_version=5, config=values)
    (checkpoint / "state.json").write_text(
        json.dumps({"format": 1, "step": state.step, "bias_version": state.bias_version, "config": values})
    )
    return directory


def _logits(model: LoadedModel) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model.transformer(tokens, experts=model.experts)


def test_export_leaves_the_training_state_behind_and_the_function_alone(run: Path, tmp_path: Path) -> None:
    result = export_checkpoint(run, tmp_path / "hf")
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert "state.json" not in files
    assert not any(name.startswith("optimizer") for name in files)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= files
    assert torch.equal(_logits(load_model(tmp_path / "hf")), _logits(load_model(run)))
    assert result["parameters"] == CONFIG.model.total_parameters()


def test_embedding_and_head_are_repeated_for_each_mtp_module(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "hf")
    exported = ShardReader(tmp_path / "hf")
    assert torch.equal(
        exported.tensor("model.layers.2.embed_tokens.weight"), exported.tensor("model.embed_tokens.weight")
    )
    assert torch.equal(
        exported.tensor("model.layers.2.shared_head.head.weight"), exported.tensor("lm_head.weight")
    )
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    back, first = ShardReader(tmp_path / "back"), ShardReader(run / "checkpoints" / "step-00000005")
    assert back.names == exported.names
    assert set(first.names) < set(back.names)
    assert all(torch.equal(back.tensor(name), exported.tensor(name)) for name in back.names)


def test_a_cast_leaves_the_bias_in_float32(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "hf", dtype="bfloat16")
    reader = ShardReader(tmp_path / "hf")
    for name in reader.names:
        expected = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert reader.tensor(name).dtype == expected, name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_cut_into_shards(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.tools.convert._SHARD_BYTES", 50_000)
    export_checkpoint(run, tmp_path / "hf")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert torch.equal(_logits(load_model(tmp_path / "hf")), _logits(load_model(run)))


def test_a_directory_in_use_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_the_working_directory_is_a_target_while_it_is_empty(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "hf"
    here.mkdir()
    monkeypatch.chdir(here)
    export_checkpoint(run, Path("."))
    assert (here / "config.json").is_file()
    monkeypatch.chdir(here)
    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(run, Path("."))


@pytest.mark.parametrize("target", ["file/x", "loop", "/proc/nope/x"])
def test_a_target_that_cannot_be_made_is_named(run: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(
        CheckpointError, match=f"cannot write .*{target}: .*give a directory that can be written"
    ):
        export_checkpoint(run, tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_an_unknown_dtype_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fp8.*float32, bfloat16, float16"):
        export_checkpoint(run, tmp_path / "hf", dtype="fp8")
    assert list(tmp_path.iterdir()) == []


def _spoil(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Rewrite the only shard of an exported model with tensors replaced or removed."""
    reader = ShardReader(directory)
    tensors: dict[str, Any] = {name: reader.tensor(name) for name in reader.names} | change
    (shard,) = directory.glob("*.safetensors")
    write_shard(shard, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    write_index(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.1.mlp.experts.3.up_proj.weight": None}, r"lacks 1 tensors, .*experts\.3\.up_proj"),
        ({"model.norm.weight": torch.zeros(3)}, r"model\.norm\.weight has shape \[3\].*\[32\]"),
        ({"model.layers.2.embed_tokens.weight": torch.zeros(512, 32)}, r"differs from model\.embed_tokens"),
    ],
)
def test_import_refuses_a_model_that_does_not_fit(
    run: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], said: str
) -> None:
    export_checkpoint(run, tmp_path / "hf")
    _spoil(tmp_path / "hf", change)
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_import_dequantises_fp8(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "hf")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    weight = ShardReader(tmp_path / "hf").tensor(name)
    packed, scale = quantize(weight)
    _spoil(tmp_path / "hf", {name: packed, name + SCALE_SUFFIX: scale})
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    back = ShardReader(tmp_path / "back")
    assert name + SCALE_SUFFIX not in back
    assert back.tensor(name).dtype == torch.float32
    assert not torch.equal(back.tensor(name), weight)
    assert torch.allclose(back.tensor(name), weight, atol=float(weight.abs().max()) / 16)


@pytest.mark.parametrize(
    ("overrides", "differs"),
    [
        (["model.num_experts_per_tok=4"], False),
        (["model.num_experts_per_tok=2"], True),
        (["model.num_experts_per_tok=4", "model.group_score=affinity"], True),
        (["model.topk_group=4"], False),
        (["model.num_experts_per_tok=2", "model.group_score_experts=2"], False),
        (["model.num_experts_per_tok=4", "model.group_score_experts=1"], True),
    ],
)
def test_export_notes_where_others_route_differently(overrides: list[str], differs: bool) -> None:
    model = load_config(preset_name="tiny", overrides=overrides).model
    assert bool(_deviation(model)) == differs


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


def test_a_checkpoint_that_is_cut_off_says_what_to_do(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run / "checkpoints" / "step-00000005", broken)
    shard = broken / "model-trunk.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model-trunk\.safetensors is damaged"):
        load_model(broken)


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


def test_unused_tensors_are_named_where_a_model_is_loaded(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_nextn_predict_layers": 0}))
    module = ShardReader(tmp_path / "hf").names
    count = sum(name.startswith("model.layers.2.") for name in module)
    said: list[str] = []
    load_model(tmp_path / "hf", note=said.append)
    assert said == [f"{tmp_path / 'hf'} has tensors that the model does not use: model.layers.2.* ({count})"]
    assert import_checkpoint(tmp_path / "hf", tmp_path / "back")["unused"] == f"model.layers.2.* ({count})"
    load_model(tmp_path / "back", note=said.append)
    assert len(said) == 1
