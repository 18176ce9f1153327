"""Tells whether a tokenizer takes time and memory in proportion to a text, by its parts.

A tokenizer.json is a program: regular expressions that backtrack, replacements that grow a text. Parts that
are known to take linear time are listed here; what has others is encoded in a confined process
(`jobs/data/tokenizer_process.py`), or refused where it decodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

_GROWTH = 8.0
"""How many times longer replacements may make a text, one after the other."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_PATTERNS = frozenset(
    {
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # GPT-4 and Llama 3; Qwen
        *(
            rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
            for digits in (r"\p{N}{1,3}", r"\p{N}")
        ),
        # GPT-4o
        rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        # DeepSeek-V3
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!" '"' r"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # others' digits, spaces and line ends
        r"\p{N}", r"\d", r"\s", r" ", r"\n", r"[\r\n]", r" {2,}", r"\s+", r"\d{1,3}", r"[0-9]",
    }
)  # fmt: skip
_NORMALIZERS = frozenset(
    {"BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents"}
)
_PRE_TOKENIZERS = frozenset(
    {
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace",
        "Punctuation", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    }
)  # fmt: skip
_MODELS = frozenset({"BPE", "WordLevel"})
_LONGEST_PREPEND = 64  # characters


def encodes_linearly(tokenizer: Tokenizer) -> bool:
    """Whether encoding a text takes time and memory in proportion to its length, as far as is known."""
    normalizers, splits = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
    if normalizers is None or splits is None or type(tokenizer.model).__name__ not in _MODELS:
        return False
    return (
        _growth(normalizers) <= _GROWTH
        and all(map(_normalizes_linearly, normalizers))
        and all(one["type"] in _PRE_TOKENIZERS or _splits_linearly(one) for one in splits)
    )


def check_decoder(tokenizer: Tokenizer) -> None:
    """Check that decoding a token takes time and memory in proportion to its length.

    Raises:
        ValueError: It may not.
    """
    parts = _parts(tokenizer.decoder) or []
    for one in parts:
        if one["type"] == "Replace" and not _known(one["pattern"]):
            raise ValueError("its decoder has a regular expression, which may take hours; replace a string")
    if _growth(parts) > _GROWTH:
        raise ValueError(
            f"its decoder makes a text more than {_GROWTH:g} times longer; leave out replacements"
        )


def _parts(part: Any) -> list[dict[str, Any]] | None:
    """The description of a part as a list of its steps; None for a part that is not described."""
    if part is None:
        return []
    try:
        return list(_flat(json.loads(part.__getstate__())))
    except Exception:  # of a part written in Python
        return None


def _flat(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if described["type"] != "Sequence":
        yield described
        return
    for name in ("normalizers", "pretokenizers", "decoders"):
        for inner in described.get(name, ()):
            yield from _flat(inner)


def _normalizes_linearly(described: dict[str, Any]) -> bool:
    match described:
        case {"type": "Replace", "pattern": pattern}:
            return _known(pattern)
        case {"type": "Prepend", "prepend": str(text)}:
            return len(text) <= _LONGEST_PREPEND
    return described["type"] in _NORMALIZERS


def _splits_linearly(described: dict[str, Any]) -> bool:
    return described["type"] == "Split" and _known(described["pattern"])


def _known(pattern: dict[str, str]) -> bool:
    return "String" in pattern or _canonical(pattern.get("Regex", "")) in _PATTERNS


def _canonical(expression: str) -> str:
    """An expression with line ends and quotes in one of the ways in which files spell them."""
    return expression.replace("\r", r"\r").replace("\n", r"\n").replace(r"\"", '"')


def _growth(parts: list[dict[str, Any]]) -> float:
    """How many times longer the replacements of a chain can make a text."""
    times = 1.0
    for one in parts:
        if one["type"] == "Replace":
            shortest = len(one["pattern"].get("String", "x"))
            times *= max(1.0, len(one["content"]) / max(1, shortest))
    return times


__all__ = ["check_decoder", "encodes_linearly"]
