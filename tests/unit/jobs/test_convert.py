"""Export to and import from Hugging Face directories, and models that do not fit or are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import CheckpointError, ConfigError
from jobs.checkpoints.loaded_model import LoadedModel, load_model
from jobs.config.config_file import load_config
from jobs.tools.convert import _deviation, export_checkpoint, import_checkpoint
from model.checkpoints.fp8 import SCALE_SUFFIX, quantize
from model.checkpoints.pretrained import ShardReader, write_index, write_shard
from support.random_run import CONFIG


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


def test_a_checkpoint_that_is_cut_off_says_what_to_do(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run / "checkpoints" / "step-00000005", broken)
    shard = broken / "model-trunk.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model-trunk\.safetensors is damaged"):
        load_model(broken)


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
