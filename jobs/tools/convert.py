"""`raymoe export` and `raymoe import`: convert checkpoints to and from plain Hugging Face directories.

Only one shard is in memory at a time, whatever the size of the model. The directory gets its final name when
it is complete.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import CheckpointError, ConfigError, ResourceError
from jobs.checkpoints.checkpoint_store import CheckpointStore, find_weights
from jobs.checkpoints.memory_need import free_memory
from jobs.config.hub_names import hub_hint
from jobs.data.carried_files import TOKENIZER_FILE, CarriedFiles
from jobs.data.tokenizer import load_tokenizer
from model.checkpoints.expected_tensors import copies, described, tensor_shapes
from model.checkpoints.fp8 import is_fp8
from model.checkpoints.guarded_files import is_there
from model.checkpoints.hf_names import duplicate_names, empty_shapes
from model.checkpoints.pretrained import PretrainedSource
from model.checkpoints.shards import INDEX, ShardReader, write_json, write_shard
from model.config import THEIR_SCORED_EXPERTS, ModelConfig

_SHARD_BYTES = 2 << 30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export_checkpoint(
    checkpoint: Path, target: Path, *, dtype: str | None = None, mtp: bool = True
) -> dict[str, Any]:
    """Write weights, configuration and tokenizer in the format of transformers and vLLM.

    Args:
        checkpoint: A checkpoint, or a run's directory, whose latest checkpoint is taken.
        target: A directory that does not exist, or is empty.
        dtype: Type to cast weights to; None keeps each tensor's (float32 for fp8).
        mtp: Include the MTP modules. transformers' plain model does not use them, and lists their weights as
            unexpected unless the model has DeepSeek-V3's 61 layers.

    Returns:
        A summary; `note` is present if other implementations would route the model's tokens differently, and
        `unused` names tensors of the checkpoint that the model does not use, if there are any.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete, or `target` is not empty.
        ConfigError: `dtype` is unknown.
    """
    source = _CheckpointTensors(find_weights(checkpoint), _dtype(dtype), mtp=mtp)
    return {**_write(source, target), **_deviation(source.config)}


def import_checkpoint(source: Path, target: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Check a Hugging Face model of the DeepSeek-V3 architecture and write it as a checkpoint of weights.

    Every tensor is read, so that missing, damaged or wrongly shaped tensors are found; fp8 is dequantized.

    Args:
        source: The directory with config.json and safetensors.
        target: A directory that does not exist, or is empty.
        dtype: Type to cast weights to; None keeps each tensor's (float32 for fp8).

    Returns:
        A summary; `unused` names tensors that the model does not use, if there are any.

    Raises:
        CheckpointError: The model is missing, incomplete or of another architecture, or `target` is not
            empty.
        ConfigError: `dtype` is unknown.
    """
    if not source.exists():
        raise CheckpointError(
            f"{source} does not exist; give a directory with config.json and safetensors files"
            f"{hub_hint(source)}"
        )
    if not is_there(source / "config.json") and CheckpointStore(source / "checkpoints").complete():
        raise CheckpointError(
            f"{source} is a run's directory, which needs no import: generate, eval, serve and train --init "
            f"take it as it is, and `raymoe export {source} HF_DIR` writes a Hugging Face directory"
        )
    return _write(_CheckpointTensors(source, _dtype(dtype)), target)


class _CheckpointTensors:
    """The tensors of a directory one by one, dequantized and cast for writing."""

    def __init__(self, directory: Path, dtype: torch.dtype | None, *, mtp: bool = True) -> None:
        self.directory = directory
        self._source = PretrainedSource(directory, dtype=dtype)
        self._reader = ShardReader(directory)
        self.unused = self._source.unused
        config = self._source.config
        self.config = config if mtp else config.model_copy(update={"num_nextn_predict_layers": 0})
        self._cast = dtype
        self.shapes = tensor_shapes(self.config)
        missing = [name for name in self.shapes if name not in self._reader]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} tensors, the first {missing[0]}; it is incomplete, or its "
                "config.json is that of another model"
            )
        self._originals = duplicate_names(self.config)
        self.shapes |= {name: self.shapes[original] for name, original in self._originals.items()}
        self.shapes |= empty_shapes(self.config)

    def check_copies(self) -> None:
        """Check that the embedding and the head are the same wherever they are stored."""
        for copy, original in copies(self.config).items():
            if copy in self._reader:
                self._source.check_copy(copy, original, self.shapes[original])

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantized and cast."""
        return self._source.tensor(self._stored(name), self.shapes[name])

    def nbytes(self, name: str) -> int:
        """Size of a tensor as it is written."""
        stored = self._stored(name)
        if self._cast is not None or stored not in self._reader:
            return math.prod(self.shapes[name]) * (self._cast or torch.float32).itemsize
        quantised = is_fp8(self._reader.dtype(stored))
        return self._reader.nbytes(stored) * (torch.float32.itemsize if quantised else 1)

    def _stored(self, name: str) -> str:
        """The name by which a tensor is read: a duplicate that is not stored is read as its original."""
        return name if name in self._reader else self._originals.get(name, name)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    full = _SHORT_NAMES.get(name, name)
    if full not in _DTYPES:
        raise ConfigError(f"--dtype {name!r} is unknown; use one of {', '.join(_DTYPES)}")
    return _DTYPES[full]


def _write(source: _CheckpointTensors, target: Path) -> dict[str, Any]:
    target = target.expanduser()
    carried = _carried(source)  # before anything is written
    shards = list(_shards({name: source.nbytes(name) for name in source.shapes}))
    weight_map: dict[str, str] = {}
    sizes: Counter[torch.dtype] = Counter()
    with _appearing(target) as making:
        _check_room([sum(map(source.nbytes, names)) for names in shards], making)
        source.check_copies()
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: source.tensor(name) for name in names}
            write_shard(making / file, tensors)
            weight_map |= dict.fromkeys(names, file)
            for tensor in tensors.values():
                sizes[tensor.dtype] += tensor.nbytes
        index = {"metadata": {"total_size": sizes.total()}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(making / INDEX, index)
        dtype = sizes.most_common(1)[0][0]
        write_json(making / "config.json", _hf_config(source.config, dtype))
        carried.write(making)
    return {
        "directory": str(target),
        "source": str(source.directory),
        "tensors": len(source.shapes),
        "bytes": sizes.total(),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": source.config.total_parameters(),
        **({"unused": described(source.unused)} if source.unused else {}),
    }


def _check_room(files: Sequence[int], directory: Path) -> None:
    """Check that the disk takes files of these sizes, and the memory each of them.

    A sparse file of weights takes no room where it is, and all of it when it is written again.

    Raises:
        ResourceError: There is not enough.
    """
    memory, disk = free_memory(), shutil.disk_usage(directory).free
    if max(files) > memory:
        raise ResourceError(
            f"one file of weights needs {max(files):,} bytes of memory, and {memory:,} are free; use "
            "a larger machine"
        )
    if sum(files) > disk:
        raise ResourceError(
            f"the weights need {sum(files):,} bytes on the disk, and {disk:,} are free; give "
            "another directory"
        )


def _shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Split tensors, given with their bytes, into files."""
    held: list[str] = []
    size = 0
    for name, width in sizes.items():
        if held and size + width > _SHARD_BYTES:
            yield held
            held, size = [], 0
        held.append(name)
        size += width
    yield held


def _hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    # Older versions of transformers read the second name.
    return {**config.to_hf(), "dtype": name, "torch_dtype": name}


def _carried(source: _CheckpointTensors) -> CarriedFiles:
    """What the source has beside its weights; ids of special tokens that its config.json does not name are
    the tokenizer's."""
    carried = CarriedFiles.of_model(source.directory)
    if TOKENIZER_FILE not in carried.files:
        return carried
    text = load_tokenizer(source.directory, source.config.vocab_size)
    return carried.over(CarriedFiles(config=text.ids))


def _deviation(config: ModelConfig) -> dict[str, str]:
    """A note if other implementations of this architecture would route the model's tokens differently."""
    ours = config.scored_experts
    if config.topk_group == config.n_group:
        return {}
    if config.group_score == "biased" and ours == THEIR_SCORED_EXPERTS:
        return {}
    return {
        "note": f"this model scores a group by its best {ours} {config.group_score} scores; transformers "
        f"and vLLM always take the best {THEIR_SCORED_EXPERTS} biased ones and route some tokens differently"
    }


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a directory to write into, which is renamed to `target` on success and deleted on failure."""
    try:
        place = Path(os.path.realpath(target))  # `.` has no name, from which another one is made
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise CheckpointError(f"{target} exists already; give a directory that is new or empty")
        making = place.with_name(f".{place.name}.writing")
        shutil.rmtree(making, ignore_errors=True)
        try:
            making.mkdir(parents=True)
            yield making
            making.replace(place)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error}; give a directory that can be written"
        ) from None


__all__ = ["export_checkpoint", "import_checkpoint"]
