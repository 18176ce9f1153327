"""Streamed text: whole characters only, and no part of a possible stop string."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from engine.text import Detokenizer, TextStream
from jobs.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat; ünïcödé wörds 猫 and the hat"] * 4, 300)[0]


def fed(stream: TextStream, tokenizer: Tokenizer, text: str) -> list[str]:
    given = []
    for token in tokenizer.encode(text).ids:
        given.append(stream.feed(token))
        if stream.stopped:
            break
    return [*given, stream.finish()]


@pytest.mark.parametrize("text", ["the cat sat", "ünïcödé 猫猫 ❤ wörds", "", "🙂🙂"])
def test_the_parts_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    parts = fed(TextStream(Detokenizer(tokenizer)), tokenizer, text)
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("sat",), "the cat "),
        (("at s",), "the c"),
        (("mat", "cat"), "the "),
        (("dog",), "the cat sat on the mat"),
        (("mat!",), "the cat sat on the mat"),
        (("t",), ""),
    ],
)
def test_a_stop_string_ends_the_text_across_tokens(
    tokenizer: Tokenizer, stops: tuple[str, ...], expected: str
) -> None:
    stream = TextStream(Detokenizer(tokenizer), stops)
    parts = fed(stream, tokenizer, "the cat sat on the mat")
    assert "".join(parts) == stream.text == expected
    assert stream.stopped == (expected != "the cat sat on the mat")


def test_text_that_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    stream = TextStream(Detokenizer(tokenizer), ["mat!"])
    given = "".join(stream.feed(token) for token in tokenizer.encode("on the mat").ids)
    assert given == "on the "
    assert stream.finish() == "mat"


def test_a_stop_string_before_min_tokens_does_not_count(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat on the cat").ids
    stream = TextStream(Detokenizer(tokenizer), ["cat"], min_tokens=len(ids) - 1)
    assert "".join(fed(stream, tokenizer, "the cat sat on the cat")) == "the cat sat on the "


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("❤").ids
    stream = TextStream(Detokenizer(tokenizer))
    assert "".join(stream.feed(token) for token in ids[:-1]) == ""
    assert stream.finish() == tokenizer.decode(ids[:-1])
