"""The process that loads a stranger's tokenizer, tries it, and encodes texts with it."""

from __future__ import annotations

import os
import random
import string
from collections.abc import Iterator
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from jobs.confined.confined_worker import Answer, answer_lines
from jobs.data.tokenizer_bounds import check_decoder

_TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog's 1,234 friends.\n\n\tdef f(x): return x ** 2  # why?\r\n",
    "Größe, ça va, Привет, 数学は楽しい, 한국어, مرحبا, 🙂👍🏽, \u200b\ufeff\x00",
)
_RUN = 48  # characters; expressions that backtrack take longest where a run of one character ends otherwise
_ROUNDS, _TOKENS = 24, 24
_GROWTH = 64  # tokens per character, and characters per character of a token


def main() -> None:
    """Answer texts by their tokens, and null by a trial; the data is a tokenizer.json."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would take memory by their number
    answer_lines(_begin, _told)


def _begin(_: Any, data: bytes) -> Answer:
    tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return partial(_answer, tokenizer)


def _answer(tokenizer: Tokenizer, question: dict[str, Any] | None) -> list[int]:
    if question is None:
        check_decoder(tokenizer)
        _try_encoding(tokenizer)
        _try_decoding(tokenizer)
        return []
    ids: list[int] = tokenizer.encode(question["text"], add_special_tokens=question["special"]).ids
    return ids


def _try_encoding(tokenizer: Tokenizer) -> None:
    tokenizer.encode("a")
    for text in _texts():
        try:
            size = len(tokenizer.encode(text).ids)
        except Exception:  # a character that it does not know; a panic is no Exception
            continue
        if size > _GROWTH * (len(text) + 1):
            raise ValueError(f"it makes {size:,} tokens of {len(text)} characters")


def _try_decoding(tokenizer: Tokenizer) -> None:
    source, size = random.Random(0), tokenizer.get_vocab_size()
    for _ in range(_ROUNDS if size else 0):
        ids = [source.randrange(size) for _ in range(_TOKENS)]
        length = sum(len(tokenizer.id_to_token(id) or "") for id in ids)
        try:
            text = tokenizer.decode(ids, skip_special_tokens=False)
        except Exception:  # each request that has such tokens is told
            continue
        if len(text) > _GROWTH * (length + len(ids)):
            raise ValueError(f"it makes {len(text):,} characters of tokens with {length:,}")


def _texts() -> Iterator[str]:
    yield from _TEXTS
    for character in f"{string.printable}éß猫▁":
        yield character * _RUN + "\x01\n\x01"


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__


__all__ = ["main"]
