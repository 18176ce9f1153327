"""Checkpoints: round trips, fp8, partial reads, and every kind of damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import CheckpointError
from model.checkpoints.fp8 import SCALE_SUFFIX, dequantize, quantize
from model.checkpoints.hf_names import EMBEDDING, expert_names
from model.checkpoints.pretrained import (
    CausalLM,
    PretrainedSource,
    RandomSource,
    ShardReader,
    load_pretrained,
    save_pretrained,
    write_index,
    write_json,
    write_shard,
)
from model.config import ModelConfig
from support.small_config import SMALL

INDEX = "model.safetensors.index.json"


def saved(directory: Path, *, shard_bytes: int = 1 << 30, **changes: Any) -> CausalLM:
    config = ModelConfig.model_validate({**SMALL, **changes})
    model = CausalLM(config)
    model.load(RandomSource(config, 3))
    model.trunk.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").normal_()
    save_pretrained(model, directory, shard_bytes=shard_bytes)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_nextn_predict_layers": 2},
        {"num_nextn_predict_layers": 1, "mtp_mode": "parallel", "tie_word_embeddings": True},
        {"n_shared_experts": 0},
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = saved(tmp_path, **changes)
    back = load_pretrained(tmp_path)
    assert back.config == model.config
    state = back.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tied = back.trunk.lm_head.weight is back.trunk.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    tokens = torch.arange(10).view(1, 10)
    logits = back(tokens)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model(tokens))


def test_shards_and_index(tmp_path: Path) -> None:
    saved(tmp_path, shard_bytes=4000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert not list(tmp_path.glob(".*"))


def test_stored_in_bfloat16(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    save_pretrained(model, tmp_path / "b", dtype=torch.bfloat16)
    reader = ShardReader(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    for name in reader.names:
        bias = name.endswith("e_score_correction_bias")
        assert reader.tensor(name).dtype == (torch.float32 if bias else torch.bfloat16)
    back = load_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert back.trunk.lm_head.weight.dtype == torch.bfloat16
    assert back(torch.arange(4).view(1, 4)).dtype == torch.float32
    for name, tensor in back.trunk.named_buffers():
        assert torch.equal(tensor, model.trunk.get_buffer(name))


def test_mtp_duplicates_are_written_and_not_needed(tmp_path: Path) -> None:
    model = saved(tmp_path, num_nextn_predict_layers=1)
    reader = ShardReader(tmp_path)
    embedding = reader.tensor("model.layers.3.embed_tokens.weight")
    head = reader.tensor("model.layers.3.shared_head.head.weight")
    assert torch.equal(embedding, model.trunk.model.embed_tokens.weight)
    assert torch.equal(head, model.trunk.lm_head.weight)
    rewrite(tmp_path, lambda state: [state.pop(n) for n in list(state) if "shared_head.head" in n])
    load_pretrained(tmp_path)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint that has one file."""
    (file,) = directory.glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file)
    write_index(directory, [file.name])


def to_fp8(directory: Path, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Quantise a checkpoint's projections as DeepSeek-V3 is released; their exact values by name."""
    exact: dict[str, torch.Tensor] = {}

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [n for n in state if n.endswith("_proj.weight")]:
            state[name], scale = quantize(state[name], block)
            state[name + SCALE_SUFFIX] = scale
            rows, columns = state[name].shape
            exact[name] = torch.stack(
                [
                    torch.stack(
                        [
                            state[name][r, c].float() * scale[r // block[0], c // block[1]]
                            for c in range(columns)
                        ]
                    )
                    for r in range(rows)
                ]
            )

    rewrite(directory, change)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    path.write_text(json.dumps(values))
    return exact


def test_fp8(tmp_path: Path) -> None:
    """Blocks that do not divide the weights; each value has the scale of its block."""
    model = saved(tmp_path)
    exact = to_fp8(tmp_path, (8, 5))
    source = PretrainedSource(tmp_path)
    gate, up, down = (exact[name] for name in expert_names(2, 5))
    w13, w2 = source.expert(2, 5)
    assert torch.equal(w13, torch.cat((gate, up)))
    assert torch.equal(w2, down)
    trunk = source.trunk()
    for name, tensor in trunk.items():
        if name in exact:
            assert torch.equal(tensor, exact[name]), name
            plain = model.trunk.state_dict()[name]
            assert (tensor - plain).abs().max() <= plain.abs().max() / 16
    assert torch.equal(trunk[EMBEDDING], model.trunk.model.embed_tokens.weight)


def test_fp8_round_trip_of_exact_values() -> None:
    weight = torch.tensor([[448.0, 2.0, 0.5], [0.0, -448.0, 0.25]])
    stored, scale = quantize(weight, (2, 2))
    assert scale.tolist() == [[1.0, pytest.approx(0.5 / 448)]]
    torch.testing.assert_close(dequantize(stored, scale, (2, 2)), weight)


def test_reads_only_what_is_asked_for(tmp_path: Path) -> None:
    """One expert can be read when only its own file exists."""
    model = saved(tmp_path, shard_bytes=1)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    wanted = {index[name] for name in expert_names(2, 5)}
    for path in tmp_path.glob("*.safetensors"):
        if path.name not in wanted:
            path.unlink()
    w13, w2 = PretrainedSource(tmp_path).expert(2, 5)
    mine = model.experts.weights(2)
    assert torch.equal(w13, mine[0][5])
    assert torch.equal(w2, mine[1][5])


def test_modules_missing_as_transformers_saves_them(tmp_path: Path) -> None:
    saved(tmp_path, num_nextn_predict_layers=1)
    rewrite(tmp_path, lambda state: [state.pop(n) for n in list(state) if ".layers.3." in n])
    assert load_pretrained(tmp_path).config.num_nextn_predict_layers == 0


def test_random_source_is_the_same_wherever_asked() -> None:
    config = ModelConfig(**SMALL)
    one, other = RandomSource(config, 1), RandomSource(config, 1, torch.float64)
    other.expert(2, 3)
    for a, b in zip(one.expert(1, 4), other.expert(1, 4), strict=True):
        assert torch.equal(a.double(), b)
    assert not torch.equal(one.expert(1, 4)[0], one.expert(1, 5)[0])
    assert not torch.equal(one.expert(1, 4)[0], one.expert(2, 4)[0])
    assert not torch.equal(one.expert(1, 4)[0], RandomSource(config, 2).expert(1, 4)[0])
    trunk = one.trunk()
    assert trunk["model.norm.weight"].eq(1).all()
    assert trunk["lm_head.weight"].std().item() == pytest.approx(config.initializer_range, rel=0.1)
    bias = other.trunk()["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert not bias.any()


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(directory: Path, keep: int) -> None:
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:keep])


GATE = "model.layers.1.mlp.gate.weight"
UP = "model.layers.1.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "no JSON object"),
        (lambda d: edit_config(d, model_type="llama"), "model_type is 'llama'"),
        (lambda d: edit_config(d, n_group=3), "n_group"),
        (lambda d: edit_config(d, hidden_size=8), r"has shape \[40, 16\].*\[40, 8\]"),
        (lambda d: edit_config(d, n_routed_experts=16, n_group=4), r"gate.*shape"),
        (lambda d: edit_config(d, num_hidden_layers=4), r"no tensor model\.layers\.3"),
        (lambda d: edit_config(d, quantization_config={"quant_method": "awq"}), "awq"),
        (lambda d: (d / INDEX).unlink(), f"neither {INDEX} nor model.safetensors"),
        (lambda d: (d / INDEX).write_text("{}"), f"{INDEX} is damaged"),
        (lambda d: (d / INDEX).write_text('{"weight_map": 3}'), f"{INDEX} is damaged"),
        (lambda d: next(d.glob("*.safetensors")).unlink(), "is missing, though"),
        (lambda d: cut(d, 3), "damaged or cut short"),
        (lambda d: cut(d, 500), "damaged or cut short"),
        (lambda d: cut(d, -1), "damaged or cut short"),
        (lambda d: rewrite(d, lambda s: s.pop(UP)), f"no tensor {UP}"),
        (lambda d: rewrite(d, lambda s: s.pop(GATE)), f"no tensor {GATE}"),
        (lambda d: rewrite(d, lambda s: s.update({UP: s[UP][:-1].clone()})), f"{UP} has shape"),
        (
            lambda d: rewrite(d, lambda s: s.update({UP: s[UP].to(torch.float8_e4m3fn)})),
            f"{UP} is fp8 but {UP}_scale_inv is missing",
        ),
        (
            lambda d: rewrite(
                d,
                lambda s: s.update({UP: s[UP].to(torch.float8_e4m3fn), UP + SCALE_SUFFIX: torch.ones(2, 2)}),
            ),
            f"{UP}_scale_inv has shape",
        ),
    ],
)
def test_damaged(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        ShardReader(tmp_path / "nowhere")


def test_index_may_not_leave_the_directory(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    (tmp_path / "b.safetensors").write_bytes(b"")
    index["weight_map"][GATE] = "../b.safetensors"
    (tmp_path / "a" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./b\.safetensors', which is none of its"):
        load_pretrained(tmp_path / "a")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model-x.safetensors"
    write_shard(path, {"a": torch.ones(3)})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.checkpoints.shards.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_shard(path, {"a": torch.zeros(3)})
    assert torch.equal(ShardReader(path).tensor("a"), torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(CheckpointError, match="cannot write"):
        write_json(tmp_path / "nowhere" / "x.json", {})


def test_files_of_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        saved(tmp_path / "a")
    finally:
        os.umask(before)
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == {".safetensors": 0o640, ".json": 0o640}


def test_an_unfinished_checkpoint_has_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)

    def stop(*_: object) -> None:
        raise CheckpointError("stopped")

    monkeypatch.setattr("model.checkpoints.pretrained.write_index", stop)
    with pytest.raises(CheckpointError, match="stopped"):
        save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_pretrained(tmp_path)


def test_views_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    both = torch.arange(12.0).view(4, 3)
    tensors = {"top": both[:2], "bottom": both[2:], "all": both, "turned": both.t(), "again": both}
    write_shard(tmp_path / "model-a.safetensors", tensors)
    write_index(tmp_path)
    reader = ShardReader(tmp_path)
    assert reader.names == ("again", "all", "bottom", "top", "turned")
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.tensor(name), tensor)
