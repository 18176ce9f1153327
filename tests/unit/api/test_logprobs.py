"""A token's text, bytes and position in answers with log probabilities, in OpenAI's two formats."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.sequence import TokenLogprobs
from engine.text import Detokenizer
from jobs.api.logprob_bodies import TextOffsets, chat_logprobs, completion_logprobs
from support.tokenizers import byte_fallback, byte_level

UNKNOWN = "\ufffd"
LEVEL, FALLBACK = byte_level()[0], byte_fallback()[0]


def ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    found = [tokenizer.token_to_id(piece) for piece in pieces]
    assert None not in found
    return found


@pytest.mark.parametrize(
    ("tokenizer", "piece", "text", "data"),
    [
        (FALLBACK, "<0xE4>", None, [0xE4]),
        (FALLBACK, "▁self", " self", list(b" self")),
        (FALLBACK, "<0x41>", "A", [0x41]),
        (FALLBACK, "</s>", "</s>", list(b"</s>")),
        (LEVEL, bytes_to_unicode()[0xE7], None, [0xE7]),
        (LEVEL, bytes_to_unicode()[0x0A], "\n", [0x0A]),
        (LEVEL, "Ġthe", " the", list(b" the")),
    ],
    ids=str,
)
def test_a_token_has_its_own_text_and_bytes(
    tokenizer: Tokenizer, piece: str, text: str | None, data: list[int]
) -> None:
    tokens = ids(tokenizer, piece)
    detokenizer, at = Detokenizer(tokenizer), TokenLogprobs(token=-1.0, best=[(tokens[0], -1.0)])
    entry = chat_logprobs(detokenizer, tokens, [at])["content"][0]
    assert entry["bytes"] == data == entry["top_logprobs"][0]["bytes"]
    assert entry["token"] == (f"\\x{data[0]:02x}" if text is None else text)
    shown = completion_logprobs(detokenizer, tokens, [at], [0])
    assert shown["tokens"] == [f"bytes:\\x{data[0]:02x}" if text is None else text]
    assert shown["top_logprobs"] == [{shown["tokens"][0]: -1.0}]


def test_tokens_of_equal_text_all_stay_among_the_likeliest() -> None:
    detokenizer = Detokenizer(FALLBACK)
    letter, byte = ids(FALLBACK, "A", "<0x41>")
    missing = FALLBACK.get_vocab_size() + 5
    best = [(letter, -0.5), (byte, -1.0), (missing, -2.0), (missing + 1, -3.0)]

    def top(token: int, value: float) -> dict[str, float]:
        at = TokenLogprobs(token=value, best=best)
        shown = completion_logprobs(detokenizer, [token], [at], [0])
        assert shown["top_logprobs"][0][shown["tokens"][0]] == value
        return dict(shown["top_logprobs"][0])

    unknown = {"": -2.0, "bytes:": -3.0}
    assert top(letter, -0.5) == {"A": -0.5, "bytes:\\x41": -1.0, **unknown}
    # The token that was chosen has the text that `tokens` shows.
    assert top(byte, -1.0) == {"bytes:\\x41": -0.5, "A": -1.0, **unknown}
    other = ids(FALLBACK, "B")[0]
    assert top(other, -9.0) == {"A": -0.5, "bytes:\\x41": -1.0, **unknown, "B": -9.0}
    assert list(top(other, -9.0)) == ["A", "bytes:\\x41", "", "bytes:", "B"]


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [(LEVEL, "the 猫 sat 🙂 on"), (FALLBACK, "the 猫 sat 🙂 on"), (LEVEL, "ünï"), (FALLBACK, "ünï")],
    ids=str,
)
def test_a_token_is_where_its_character_begins(tokenizer: Tokenizer, text: str) -> None:
    detokenizer, tokens = Detokenizer(tokenizer), tokenizer.encode(text).ids
    offsets = TextOffsets(detokenizer, start=7).take(tokens)
    # A token's position by the bytes before it; the first space of the fallback tokenizer is not in the text.
    extra = len(b"".join(map(detokenizer.own_bytes, tokens))) - len(text.encode())
    before = -extra
    for token, offset in zip(tokens, offsets, strict=True):
        whole = text.encode()[: max(0, before)]
        assert offset == 7 + len(whole.decode(errors="ignore"))
        before += len(detokenizer.own_bytes(token))


def test_positions_are_the_same_however_the_tokens_come() -> None:
    detokenizer = Detokenizer(FALLBACK)
    tokens = ids(FALLBACK, "<0x41>", "<0xE4>", "<0xFF>", "▁the", "<0xF0>", "<0x9F>", "▁cat", "<0x42>")
    at_once = TextOffsets(detokenizer).take(tokens)
    one_by_one = TextOffsets(detokenizer)
    assert [offset for token in tokens for offset in one_by_one.take([token])] == at_once
    assert FALLBACK.decode(tokens) == UNKNOWN * 3 + " the" + UNKNOWN * 2 + " catB"
    assert at_once == [0, 1, 2, 3, 7, 7, 9, 13]
