"""Tokenizers that nobody should load: each is a small file, and takes hours, gigabytes or the process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BACKTRACKING = "(a+)+$"
"""An expression that takes exponential time on a run of `a` that does not end the text."""


def described(**parts: Any) -> bytes:
    """A tokenizer.json that knows two letters, with the given parts; `model` adds to its model."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {"a": 0, "b": 1, "</s>": 2},
        "merges": [],
        **parts.pop("model", {}),
    }
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return json.dumps(
        {"version": "1.0", "added_tokens": [], **dict.fromkeys(names), **parts, "model": model}
    ).encode()


def split(expression: str) -> dict[str, Any]:
    """A pre-tokenizer that splits by a regular expression."""
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def replaced(old: str, new: str) -> dict[str, Any]:
    """A normalizer or decoder that replaces a string."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _template(single: list[Any]) -> dict[str, Any]:
    both = [{"Sequence": {"id": one, "type_id": 0}} for one in "AB"]
    return {"type": "TemplateProcessing", "single": single, "pair": both, "special_tokens": {}}


DOUBLING = [replaced("a", "aa")] * 40

TOKENIZERS: Mapping[str, bytes] = {
    "empty": b"",
    "no JSON": b"\xff" * 100,
    "deep": b"[" * 100_000,
    "no model": b"{}",
    "backtracking pre-tokenizer": described(pre_tokenizer=split(BACKTRACKING)),
    "backtracking normalizer": described(
        normalizer={"type": "Replace", "pattern": {"Regex": BACKTRACKING}, "content": ""}
    ),
    "expression that is none": described(pre_tokenizer=split("(a")),
    "doubling normalizers": described(normalizer={"type": "Sequence", "normalizers": DOUBLING}),
    "one letter becomes 100 MB": described(
        normalizer={"type": "Sequence", "normalizers": [replaced("a", "a" * 10_000)] * 2}
    ),
    "doubling decoders": described(decoder={"type": "Sequence", "decoders": DOUBLING}),
    "backtracking decoder": described(
        decoder={"type": "Replace", "pattern": {"Regex": BACKTRACKING}, "content": ""}
    ),
    "text repeated 100,000 times": described(
        post_processor=_template([{"Sequence": {"id": "A", "type_id": 0}}] * 100_000)
    ),
}
"""Each a tokenizer.json that cannot be used."""

UNKNOWN_EXPRESSION = split("c+|(ab?)+c|.")
"""An expression that is harmless on most texts, and that is not known to be so on all."""

__all__ = [
    "BACKTRACKING",
    "DOUBLING",
    "TOKENIZERS",
    "UNKNOWN_EXPRESSION",
    "described",
    "replaced",
    "split",
]
