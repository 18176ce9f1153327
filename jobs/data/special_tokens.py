"""The special tokens that the files beside a tokenizer.json name."""

from __future__ import annotations

from pathlib import Path

from jobs.data.carried_files import read_object


def special_tokens(directory: Path) -> dict[str, str]:
    """Texts of a tokenizer's special tokens by name (`bos_token`, ...), with transformers' precedence.

    A special_tokens_map.json goes before a tokenizer_config.json that does not list the added tokens, as
    older ones do not.

    Raises:
        DataError: A file is not a JSON object.
    """
    settings = read_object(directory / "tokenizer_config.json")
    listed = {} if "added_tokens_decoder" in settings else read_object(directory / "special_tokens_map.json")
    found = {}
    for name, value in {**settings, **listed}.items():
        if isinstance(value, dict):  # an AddedToken in JSON
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


__all__ = ["special_tokens"]
