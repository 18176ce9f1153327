"""Tokenizers of the kinds that checkpoints of others have, small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from jobs.data.tokenizer import train_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = [chr(code) for code in range(0x21, 0x7F)]
WORDS = ["the", "cat", "sat", "on", "mat", "self", "def"]

_LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def byte_level() -> tuple[Tokenizer, int]:
    """A byte-level tokenizer and its end-of-text token; many of its tokens are parts of characters."""
    return train_tokenizer(["the cat sat on the mat; ünïcödé wörds 猫 🙂 and the hat"] * 4, 300)


def byte_fallback() -> tuple[Tokenizer, int]:
    """A tokenizer as Llama's: words begin with ▁, unknown characters are bytes; and its end-of-text token."""
    vocabulary = _numbered([*SPECIAL, *BYTES, "▁", *LETTERS])
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for text in (f"▁{word}", word):
            for end in range(2, len(text) + 1):
                if text[:end] not in vocabulary:
                    vocabulary[text[:end]] = len(vocabulary)
                    merges.append((text[: end - 1], text[end - 1]))
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _finished(tokenizer, decoders.Sequence(_LLAMA)), vocabulary["</s>"]


def with_decoder(decoder: Any, words: Sequence[str]) -> Tokenizer:
    """A tokenizer that decodes special tokens, bytes, letters and these words; it is not made to encode."""
    model = models.BPE(_numbered([*SPECIAL, *BYTES, "▁", *LETTERS, *words]), [])
    return _finished(Tokenizer(model), decoder)


def decoder_kinds() -> dict[str, Tokenizer]:
    """Tokenizers by the kind of their decoder."""
    spaced = [f"▁{word}" for word in WORDS]
    sequence = decoders.Sequence
    return {
        "byte level": byte_level()[0],
        "byte fallback": byte_fallback()[0],
        "byte fallback, all spaces kept": with_decoder(sequence(_LLAMA[:-1]), spaced),
        "byte fallback, then metaspace": with_decoder(
            sequence([decoders.ByteFallback(), decoders.Metaspace()]), spaced
        ),
        "metaspace": with_decoder(decoders.Metaspace(), spaced),
        "metaspace, nothing prepended": with_decoder(decoders.Metaspace(prepend_scheme="never"), spaced),
        "word pieces": with_decoder(
            decoders.WordPiece(), [*WORDS, *(f"##{word}" for word in WORDS), "n't", "'s"]
        ),
        "ends of words": with_decoder(decoders.BPEDecoder(suffix="</w>"), [f"{word}</w>" for word in WORDS]),
        "joined by spaces": with_decoder(None, WORDS),
        "strings replaced late": with_decoder(
            sequence([decoders.Fuse(), decoders.Replace("the", "a cat")]), WORDS
        ),
        "letters replaced late": with_decoder(
            sequence([decoders.Fuse(), decoders.Replace("t", "tt")]), WORDS
        ),
        "repetitions dropped": with_decoder(decoders.CTC(pad_token="<s>", word_delimiter_token="▁"), WORDS),
    }


def _numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}


def _finished(tokenizer: Tokenizer, decoder: Any) -> Tokenizer:
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIAL])
    return tokenizer


__all__ = ["BYTES", "WORDS", "byte_fallback", "byte_level", "decoder_kinds", "with_decoder"]
