"""Text that grows token by token is what the tokenizers library decodes, for any tokenizer and any tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer, decoders

from engine.text import Detokenizer, TextStream
from errors import DataError
from support.tokenizers import BYTES, byte_fallback, decoder_kinds, with_decoder

KINDS = decoder_kinds()
LISTS = {"byte level": 4000, "byte fallback": 4000}
UNKNOWN = "\ufffd"


def token_lists(tokenizer: Tokenizer, count: int) -> Iterator[list[int]]:
    """Random tokens: any, bytes for the most part, and some that the vocabulary lacks."""
    source, size = random.Random(3), tokenizer.get_vocab_size()
    some = [found for byte in BYTES[0x60:] if (found := tokenizer.token_to_id(byte)) is not None]
    for number in range(count):
        among = some if some and number % 3 == 0 else range(size + 2)
        yield [
            source.choice(among) if source.random() < 0.8 else source.randrange(size)
            for _ in range(source.randrange(1, 14))
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_any_tokens_are_the_text_that_the_library_decodes(kind: str) -> None:
    tokenizer = KINDS[kind]
    detokenizer = Detokenizer(tokenizer)
    streamed = 0
    for tokens in token_lists(tokenizer, LISTS.get(kind, 400)):
        stream = TextStream(detokenizer)
        parts = [stream.feed(token) for token in tokens]
        streamed += sum(map(bool, parts))
        assert "".join([*parts, stream.finish()]) == tokenizer.decode(tokens, skip_special_tokens=True), (
            tokens
        )
    late = kind in ("strings replaced late", "repetitions dropped")
    assert (streamed == 0) == late, "text comes as it grows, unless any token may change all of it"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_the_text_as_soon_as_the_tokens_so_far_have_it(kind: str) -> None:
    tokenizer = KINDS[kind]
    detokenizer = Detokenizer(tokenizer)
    stops, source, ended = ["at", "e c", "\u00e9", "s s", "z", "n!"], random.Random(4), 0
    for tokens in token_lists(tokenizer, 300):
        chosen = source.sample(stops, 2)
        stream = TextStream(detokenizer, chosen)
        said = ""
        for token in tokens:
            said += stream.feed(token)
            if stream.stopped:
                break
        said += stream.finish()
        assert said == expected(tokenizer, tokens, chosen), (tokens, chosen)
        ended += stream.stopped
    assert ended


def expected(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> str:
    """The text that the first stop string cuts, by decoding all tokens again after each of them."""
    for end in range(1, len(tokens) + 1):
        text: str = tokenizer.decode(tokens[:end], skip_special_tokens=True).rstrip(UNKNOWN)
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)]
    whole: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return whole


def test_a_long_text_costs_each_token_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library decodes a text once, at its end, whatever its tokens are."""
    tokenizer = byte_fallback()[0]
    detokenizer = Detokenizer(tokenizer)
    calls = 0
    decode = Detokenizer.decode

    def counted(*args: object, **options: object) -> str:
        nonlocal calls
        calls += 1
        return decode(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Detokenizer, "decode", counted)
    for token in ("<0x80>", "<0x41>", "▁the"):
        stream = TextStream(detokenizer, ["never said"])
        ids = [tokenizer.token_to_id(token)] * 2000
        said = "".join(map(stream.feed, ids)) + stream.finish()
        assert said == tokenizer.decode(ids)
    assert calls == 3


def test_each_token_has_its_own_bytes() -> None:
    level, fallback = Detokenizer(KINDS["byte level"]), Detokenizer(KINDS["byte fallback"])

    def of(kind: str, piece: str) -> bytes:
        return {"byte level": level, "byte fallback": fallback}[kind].own_bytes(
            KINDS[kind].token_to_id(piece)
        )

    assert of("byte fallback", "<0xE4>") == b"\xe4" == of("byte level", "ä")
    assert of("byte fallback", "▁self") == b" self"
    assert of("byte fallback", "</s>") == b"</s>"
    assert of("byte level", "Ġthe") == b" the"
    assert of("byte level", "<|endoftext|>") == b"<|endoftext|>"
    assert fallback.own_bytes(10**6) == b""
    for kind, start in (("byte level", ""), ("byte fallback", " ")):
        tokenizer, detokenizer = KINDS[kind], Detokenizer(KINDS[kind])
        for text in ("the cat sat", "猫 on the mat 🙂"):
            ids = tokenizer.encode(text).ids
            assert b"".join(map(detokenizer.own_bytes, ids)).decode() == start + text
    for kind, token, text in (
        ("word pieces", "cat", " cat"),
        ("word pieces", "##cat", "cat"),
        ("ends of words", "cat</w>", "cat "),
        ("joined by spaces", "cat", " cat"),
        ("strings replaced late", "the", "a cat"),
    ):
        assert Detokenizer(KINDS[kind]).own_bytes(KINDS[kind].token_to_id(token)).decode() == text


def test_a_decoder_that_is_not_as_known_decodes_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.text.decoder_stages.byte_level", lambda piece: piece.lower().encode())
    tokenizer = KINDS["byte level"]
    stream = TextStream(Detokenizer(tokenizer))
    tokens = tokenizer.encode("The Cat").ids
    assert [stream.feed(token) for token in tokens] == [""] * len(tokens)
    assert stream.finish() == "The Cat"


def test_what_the_library_cannot_decode_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """An error like those of the library's own failures, which are no Exception."""

    def panics(*_: object, **__: object) -> str:
        raise Panic("index out of bounds")

    made = Detokenizer(KINDS["byte fallback"])
    monkeypatch.setattr(made, "_tokenizer", type("Broken", (), {"decode": panics, "id_to_token": chr}))
    stream = TextStream(made)
    stream.feed(65)
    with pytest.raises(DataError, match=r"index out of bounds.*tokenizer\.json"):
        stream.finish()


def test_a_decoder_that_contradicts_its_own_beginning_fails() -> None:
    """What was released cannot be taken back; the end of the text finds out."""
    tokenizer = with_decoder(decoders.Fuse(), ["cat", "sat"])
    stream = TextStream(Detokenizer(tokenizer))
    assert stream.feed(tokenizer.token_to_id("cat")) == "cat"
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("cat", "dog")])
    with pytest.raises(DataError, match="another text"):
        stream.finish()
