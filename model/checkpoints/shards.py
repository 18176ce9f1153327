"""Safetensors files, one alone or many with an index; writing is atomic."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import CheckpointError, brief, reason
from model.checkpoints.guarded_files import INDEX_FILE, is_there
from model.checkpoints.shard_header import check_header

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class ShardReader:
    """Reader of single tensors by name, which loads nothing else of the files.

    Args:
        path: Safetensors file, or directory with `model.safetensors` or `model.safetensors.index.json`. Of
            both, the single file is read, as transformers does.

    Raises:
        CheckpointError: The files are missing or damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._open: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        if self.path.is_dir():
            self._read_index()
        elif self.path.exists():
            self._list(self.path)
        else:
            raise CheckpointError(f"{self.path} does not exist; give a checkpoint's directory or file")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._file_of))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from the file's header."""
        return _DTYPES.get(self._slice(name).get_dtype()) or self.tensor(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's values, from the file's header."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def tensor(self, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read a tensor, after checking it against `shape` if given.

        Raises:
            CheckpointError: The tensor is missing, damaged or of another shape.
        """
        if shape is not None:
            self.check(name, shape)
        file = self._file(name)
        try:
            loaded: Tensor = file.get_tensor(name)
        except Exception as error:  # torch's own, too, for a dtype or a shape that it does not have
            raise _damaged(self._file_of[name], error) from None
        return loaded

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Check a tensor's shape in the file's header against the expected one.

        Raises:
            CheckpointError: The tensor is missing, damaged or of another shape.
        """
        if self.shape(name) != shape:
            raise CheckpointError(
                f"{self.path}: {name} has shape {brief(list(self.shape(name)))} where config.json makes it "
                f"{list(shape)}; the weights belong to another configuration"
            )

    def _slice(self, name: str) -> Any:
        file = self._file(name)
        try:
            return file.get_slice(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self._file_of[name], error) from None

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(
                f"{self.path} has no tensor {name}; the checkpoint is incomplete, or its config.json is "
                "that of another model"
            )
        return self._opened(self._file_of[name])

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            try:
                check_header(path)
                self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path} is missing, though {INDEX} names it; copy the checkpoint again"
                ) from None
            except (OSError, RuntimeError, SafetensorError) as error:  # torch maps the file into memory
                raise _damaged(path, error) from None
        return self._open[path]

    def _list(self, path: Path) -> None:
        self._file_of.update((name, path) for name in self._opened(path).keys())  # noqa: SIM118

    def _read_index(self) -> None:
        if is_there(self.path / _SINGLE):
            self._list(self.path / _SINGLE)
            return
        if not is_there(self.path / INDEX):
            raise CheckpointError(
                f"{self.path} has neither {INDEX} nor {_SINGLE}; give a checkpoint in safetensors format"
            )
        self._file_of.update((name, self.path / file) for name, file in read_index(self.path).items())


def read_index(directory: Path) -> dict[str, str]:
    """The file of each tensor of a directory, from its index.

    Raises:
        CheckpointError: There is no index, it is damaged, or it names a file outside the directory.
    """
    path = directory / INDEX
    try:
        entries = INDEX_FILE.json(path).get("weight_map")
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {INDEX}; copy the checkpoint again") from None
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise CheckpointError(
            f"{path} is damaged: weight_map does not map each tensor to a file; copy it again"
        )
    for file in set(entries.values()):
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise CheckpointError(
                f"{path} names the file {brief(file)}, which is none of its directory; copy it again"
            )
    return entries


def write_shard(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into one file atomically, by renaming a temporary one.

    Raises:
        CheckpointError: The file cannot be written.
    """
    path = Path(path)
    # Safetensors wants each tensor in memory of its own; the two halves of an expert's w13 share theirs.
    owned = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen: set[int] = set()
    for name, tensor in owned.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            owned[name] = tensor.clone()
        seen.add(storage.data_ptr())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors makes files for their owner alone
        save_file(owned, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        _publish(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}; check the disk and its permissions") from None


def write_index(directory: Path | str, files: Iterable[str] | None = None) -> None:
    """Write `model.safetensors.index.json` of a directory's shards, by default all of `model-*.safetensors`.

    A `model.safetensors`, which readers take before an index, is removed unless it is one of the shards.

    Raises:
        CheckpointError: A shard is missing or damaged, or the index cannot be written.
    """
    directory = Path(directory)
    if files is None:
        files = sorted(path.name for path in directory.glob("model-*.safetensors"))
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        reader = ShardReader(directory / file)
        total += sum(reader.nbytes(name) for name in reader.names)
        weight_map.update(dict.fromkeys(reader.names, file))
    write_json(
        directory / INDEX,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    if _SINGLE not in weight_map.values():
        remove(directory / _SINGLE)


def remove(path: Path) -> None:
    """Remove a file of a checkpoint that others have replaced, if it exists.

    Raises:
        CheckpointError: It cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot remove {path}: {error}; give another directory") from None


def write_json(path: Path | str, value: object) -> None:
    """Write JSON atomically, by renaming a temporary file.

    Raises:
        CheckpointError: The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        _publish(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}; check the disk and its permissions") from None


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or cut short ({reason(error)}); copy it again")


__all__ = ["INDEX", "ShardReader", "read_index", "remove", "write_index", "write_json", "write_shard"]
