"""The files beside a model's weights that its checkpoints, imports and exports carry on unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from errors import DataError
from model.checkpoints.guarded_files import CONFIG, FileGuard
from model.hf_keys import ALIASES

TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_MIB = 1 << 20


def _guard(mebibytes: int, values: int = 0) -> FileGuard:
    return FileGuard(size=mebibytes * _MIB, values=values, fix="repair or remove it", error=DataError)


TEMPLATE_GUARD = _guard(1)
"""A chat template in a file of its own."""

TOKENIZER_GUARD = _guard(128)
"""tokenizer.json; that of Gemma 3, of 262,144 tokens, has 33 MB."""

_MODEL_GUARD = replace(CONFIG, fix="repair or remove it", error=DataError)
_CODE_GUARD = _guard(1)
_TOKENIZER_FILES = {
    TOKENIZER_FILE: TOKENIZER_GUARD,
    "tokenizer_config.json": _guard(16, values=1_000_000),
    "special_tokens_map.json": _guard(4, values=200_000),
    "added_tokens.json": _guard(16, values=1_000_000),
    "tokenizer.model": _guard(64),
    "tiktoken.model": _guard(64),
    "vocab.json": _guard(64),
    "merges.txt": _guard(64),
    "chat_template.jinja": TEMPLATE_GUARD,
    "chat_template.json": TEMPLATE_GUARD,
}
_GUARDS = {**_TOKENIZER_FILES, MODEL_FILE: _MODEL_GUARD, GENERATION_FILE: _guard(4, values=200_000)}
_MORE = {"additional_chat_templates/*.jinja": TEMPLATE_GUARD, "tokenization_*.py": _CODE_GUARD}
_MOST_OF_A_PATTERN = 100  # files
# Keys of config.json that say how the weights were stored, or repeat others under another name.
_OF_THE_SOURCE = {*ALIASES, "auto_map", "dtype", "quantization_config", "rope_parameters", "torch_dtype"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedFiles:
    """Files and config.json keys of a model that its checkpoints copy unchanged.

    Attributes:
        files: Contents by name: the tokenizer, chat templates, and settings of generation.
        config: Keys of config.json but those that say how weights are stored, such as ids of special tokens;
            `write` lets the keys of the file there win.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_tokenizer(cls, directory: Path) -> CarriedFiles:
        """The files of a tokenizer, with its chat templates.

        Raises:
            DataError: A file cannot be read, or is beyond the limits of its kind.
        """
        files = {}
        for name, guard in _TOKENIZER_FILES.items():
            with suppress(FileNotFoundError):
                files[name] = guard.read(directory / name)
        for pattern, guard in _MORE.items():
            for path in files_like(directory, pattern):
                files[str(path.relative_to(directory))] = guard.read(path)
        return cls(files=files)

    @classmethod
    def of_model(cls, directory: Path) -> CarriedFiles:
        """Everything beside a model's weights.

        Raises:
            DataError: A file cannot be read, or is beyond the limits of its kind.
        """
        files = dict(cls.of_tokenizer(directory).files)
        with suppress(FileNotFoundError):
            files[GENERATION_FILE] = _GUARDS[GENERATION_FILE].read(directory / GENERATION_FILE)
        values = read_object(directory / MODEL_FILE)
        return cls(files=files, config={name: values[name] for name in values if name not in _OF_THE_SOURCE})

    def over(self, other: CarriedFiles) -> CarriedFiles:
        """These files and keys, and those that only the other has."""
        return CarriedFiles(files={**other.files, **self.files}, config={**other.config, **self.config})

    def write(self, directory: Path) -> None:
        """Write the files into a directory, and add the keys to its config.json where that lacks them."""
        for name, content in self.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        file = directory / MODEL_FILE
        if self.config and file.is_file():
            file.write_bytes(as_json({**self.config, **read_object(file)}))


def read_object(file: Path) -> dict[str, Any]:
    """The object in one of the JSON files beside a model's weights; empty if there is no such file.

    Raises:
        DataError: The file holds something else, or is beyond the limits of its kind.
    """
    try:
        return _GUARDS[file.name].json(file)
    except FileNotFoundError:
        return {}


def files_like(directory: Path, pattern: str) -> list[Path]:
    """The files of a directory that a pattern matches, sorted.

    Raises:
        DataError: There are more than such directories have.
    """
    found = list(islice(directory.glob(pattern), _MOST_OF_A_PATTERN + 1))
    if len(found) > _MOST_OF_A_PATTERN:
        raise DataError(f"{directory} has more than {_MOST_OF_A_PATTERN} files {pattern}; remove some")
    return sorted(found)


def as_json(values: Mapping[str, Any]) -> bytes:
    """An object as the contents of a JSON file."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


__all__ = [
    "GENERATION_FILE",
    "MODEL_FILE",
    "TEMPLATE_GUARD",
    "TOKENIZER_FILE",
    "TOKENIZER_GUARD",
    "CarriedFiles",
    "as_json",
    "files_like",
    "read_object",
]
