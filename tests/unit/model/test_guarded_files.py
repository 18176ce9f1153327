"""Checkpoints of strangers: each file that cannot be read costs one line, whatever it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import CheckpointError
from model import save_pretrained
from model.causal_lm import CausalLM
from model.checkpoints.expected_tensors import trunk_shapes
from model.checkpoints.guarded_files import CONFIG, METRICS
from model.checkpoints.guarded_json import DEEPEST, parse_object
from model.checkpoints.hf_config import model_config, read_hf_config
from model.checkpoints.shards import INDEX, ShardReader, write_index, write_shard
from model.checkpoints.sources import PretrainedSource
from model.config import ModelConfig
from support.hostile_files import (
    INDEXES,
    JSON,
    NO_FILES,
    NO_TEXTS,
    NOT_FINITE,
    NUMBERS,
    SHARDS,
    SIZES,
    Make,
)
from support.small_config import SMALL

pytestmark = pytest.mark.timeout(30)

SMALL_MODEL = ModelConfig.model_validate(SMALL)
_JSON = {**NO_FILES, **SIZES, **NO_TEXTS, **JSON, **NOT_FINITE}


def _cases(table: Any) -> list[Any]:
    return [pytest.param(make, said, id=name) for name, (make, said) in table.items()]


def _refused(read: Callable[[], object], path: Path, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read()
    line = str(caught.value)
    assert str(path) in line
    assert said in line
    assert line.isprintable()
    assert len(line) < len(str(path)) + 500


@pytest.mark.parametrize(("make", "said"), _cases(_JSON))
def test_a_hostile_config_is_refused(tmp_path: Path, make: Make, said: str) -> None:
    make(tmp_path / "config.json")
    _refused(lambda: read_hf_config(tmp_path), tmp_path / "config.json", said)


@pytest.mark.parametrize(("make", "said"), _cases({**_JSON, **INDEXES}))
def test_a_hostile_index_is_refused(tmp_path: Path, make: Make, said: str) -> None:
    make(tmp_path / INDEX)
    _refused(lambda: ShardReader(tmp_path), tmp_path / INDEX, said)


@pytest.mark.parametrize("name", ["model.safetensors", "of an index"])
@pytest.mark.parametrize(("make", "said"), _cases({**SHARDS, **NO_FILES}))
def test_a_hostile_file_of_weights_is_refused(tmp_path: Path, name: str, make: Make, said: str) -> None:
    if make is NO_FILES["file that grows"][0]:
        said = "damaged or cut short"  # its size is 0
    path = tmp_path / name
    make(path)
    if name == "of an index":
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    _refused(lambda: ShardReader(tmp_path).shape("a"), path, said)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "passwd"}}')
    _refused(lambda: ShardReader(tmp_path).shape("a"), tmp_path / "passwd", f"though {INDEX} names it")


def test_names_of_tensors_stay_within_the_line(tmp_path: Path) -> None:
    """A name can have line ends and escape sequences, and thousands of characters."""
    save_pretrained(CausalLM(SMALL_MODEL), tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    reader = ShardReader(shard)
    tensors = {name: reader.tensor(name).clone() for name in reader.names}
    write_shard(shard, {**tensors, "model.\x1b[31m\nred" * 200: torch.ones(3)})
    write_index(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"tensors that this model does not use.*model\.\\x1b"
    ) as caught:
        PretrainedSource(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(tmp_path)) + 500


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in NUMBERS.items() for value in values]
)
def test_an_absurd_number_is_named_with_its_field(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL_MODEL.to_hf(), field: value}))
    with pytest.raises(CheckpointError, match=field) as caught:
        model_config(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(tmp_path)) + 500


def test_the_largest_configuration_has_tensors_of_sizes_that_torch_counts() -> None:
    """No product of fields at their limits leaves 63 bits, so shapes of nothing can be made."""
    fields = {
        "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 24,
        "moe_intermediate_size": 1 << 24, "num_hidden_layers": 1, "first_k_dense_replace": 0,
        "num_attention_heads": 1 << 16, "q_lora_rank": 1 << 20, "kv_lora_rank": 1 << 20,
        "qk_nope_head_dim": 1 << 14, "qk_rope_head_dim": 1 << 14, "v_head_dim": 1 << 14,
        "n_routed_experts": 1 << 16, "n_shared_experts": 1024, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    config = ModelConfig.model_validate({**SMALL, **fields, "n_group": 1, "topk_group": 1})
    assert trunk_shapes(config)["model.embed_tokens.weight"] == (1 << 24, 1 << 20)


def test_what_published_files_have_is_read() -> None:
    data = b'{"a": 1, "model_max_length": 1000000000000000019884624838656, "b": "\\ud83d\\ude42", "a": 2}'
    parsed = parse_object(data, values=10)
    assert parsed == {"a": 2, "model_max_length": 1000000000000000019884624838656, "b": "🙂"}
    deep = b'{"a":' * (DEEPEST - 1) + b"{}" + b"}" * (DEEPEST - 1)
    assert parse_object(deep, values=DEEPEST)
    with pytest.raises(ValueError, match="more than 63 values"):
        parse_object(deep, values=DEEPEST - 1)
    with pytest.raises(ValueError, match="64 deep"):
        parse_object(b'{"a":' + deep + b"}", values=100)


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """Hugging Face's cache consists of links."""
    torch.manual_seed(0)
    save_pretrained(CausalLM(SMALL_MODEL), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    PretrainedSource(tmp_path / "snapshot").check()


def test_a_file_of_the_largest_size_is_read_and_a_larger_one_is_not(tmp_path: Path) -> None:
    guard = replace(CONFIG, size=100)
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert guard.read(tmp_path / "a") == b"x" * 100
    (tmp_path / "a").write_bytes(b"x" * 101)
    _refused(
        lambda: guard.read(tmp_path / "a"), tmp_path / "a", "has 101 bytes, and such a file has at most 100"
    )


@pytest.fixture(params=[7, 9])
def changing(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, int]:
    """A file of 8 bytes that has another size as soon as it is read, and that size."""
    path = tmp_path / "a"
    path.write_bytes(b"x" * 8)
    read = os.read

    def change(handle: int, most: int) -> bytes:
        os.truncate(path, request.param)
        return read(handle, most)

    monkeypatch.setattr(os, "read", change)
    return path, request.param


def test_a_file_that_changes_while_it_is_read_is_refused(changing: tuple[Path, int]) -> None:
    path, _ = changing
    _refused(lambda: CONFIG.read(path), path, "its size changed while it was read")


def test_a_file_that_grows_is_read_as_far_as_it_went(changing: tuple[Path, int]) -> None:
    path, size = changing
    if size > 8:
        assert METRICS.read(path) == b"x" * 8
    else:
        _refused(lambda: METRICS.read(path), path, "its size changed while it was read")


def test_a_pipe_that_takes_the_place_of_a_file_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a path and its opening, another process can exchange the file."""
    path = tmp_path / "a"
    path.write_bytes(b"{}")
    opened = os.open

    def exchanging(file: Any, *args: Any, **kwargs: Any) -> int:
        if file == path:
            path.unlink()
            os.mkfifo(path)
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", exchanging)
    _refused(lambda: CONFIG.read(path), path, "it is a named pipe, not a file")
