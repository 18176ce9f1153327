"""The files beside a model's weights that its checkpoints, imports and exports carry on unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import DataError
from model.hf_keys import ALIASES

TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MORE = ("additional_chat_templates/*.jinja", "tokenization_*.py")
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
        """The files of a tokenizer, with its chat templates."""
        names = [name for name in _TOKENIZER_FILES if (directory / name).is_file()]
        for pattern in _MORE:
            names += [str(path.relative_to(directory)) for path in sorted(directory.glob(pattern))]
        return cls(files={name: (directory / name).read_bytes() for name in names})

    @classmethod
    def of_model(cls, directory: Path) -> CarriedFiles:
        """Everything beside a model's weights.

        Raises:
            DataError: config.json is damaged.
        """
        files = dict(cls.of_tokenizer(directory).files)
        if (directory / GENERATION_FILE).is_file():
            files[GENERATION_FILE] = (directory / GENERATION_FILE).read_bytes()
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
    """The JSON object in a file; empty if there is no such file.

    Raises:
        DataError: The file holds something else.
    """
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; repair or remove it") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} is not valid JSON ({reason}); repair or remove it") from None
    if not isinstance(values, dict):
        raise DataError(f"{file} is not a JSON object; repair or remove it")
    return values


def as_json(values: Mapping[str, Any]) -> bytes:
    """An object as the contents of a JSON file."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


__all__ = [
    "GENERATION_FILE",
    "MODEL_FILE",
    "TOKENIZER_FILE",
    "CarriedFiles",
    "as_json",
    "read_object",
]
