"""The decoders of a tokenizer.json as stages that take the pieces of a text one by one.

A stage's input piece is a token's string for the first stage, and the previous stage's output for the others.
A stage gives a piece only once no later piece can change it. Where a decoder treats every piece by itself, or
the first or the last piece in another way, the stage calls that decoder with one piece. Decoders that look at
several pieces are written here.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from tokenizers import decoders

UNKNOWN = "\ufffd"
"""What bytes that are no character decode to."""

Change = Callable[[str], str]
_CACHED = 1 << 16  # pieces whose decoding is kept, of each decoder


class DecoderStage(Protocol):
    """One decoder of a chain, with its state for one text."""

    def push(self, piece: str) -> Sequence[str]:
        """Take the next piece; the pieces that have become certain."""
        ...

    def held(self) -> Sequence[str]:
        """The pieces that would follow if the text ended here, without an incomplete character."""
        ...


class EachPiece:
    """A decoder that treats every piece by itself, and possibly the first one in another way.

    Args:
        first: Decodes the first piece.
        later: Decodes any other piece.
    """

    def __init__(self, first: Change, later: Change) -> None:
        self._next, self._later = first, later

    def push(self, piece: str) -> Sequence[str]:
        change, self._next = self._next, self._later
        return (change(piece),)

    def held(self) -> Sequence[str]:
        return ()


class LastPieceApart:
    """A decoder that treats the last piece in another way than all others (`BPEDecoder`).

    Args:
        inner: Decodes a piece that another one follows.
        last: Decodes the last piece.
    """

    def __init__(self, inner: Change, last: Change) -> None:
        self._inner, self._last = inner, last
        self._piece: str | None = None

    def push(self, piece: str) -> Sequence[str]:
        before, self._piece = self._piece, piece
        return () if before is None else (self._inner(before),)

    def held(self) -> Sequence[str]:
        return () if self._piece is None else (self._last(self._piece),)


class ByteRuns:
    """`ByteFallback`: consecutive pieces like `<0xE4>` are bytes.

    They are a text if all bytes of the run together are UTF-8; otherwise each byte of the run is an unknown
    character. So a run is certain when it has ended, or when it can become UTF-8 no more.
    """

    def __init__(self) -> None:
        self._bytes = 0  # of the run so far
        self._text = ""  # whole characters of the run
        self._rest = b""  # of an incomplete character after them
        self._broken = False

    def push(self, piece: str) -> Sequence[str]:
        byte = byte_of(piece)
        if byte is None:
            return (*self._end_run(), piece)
        self._bytes += 1
        if self._broken:
            return (UNKNOWN,)
        try:
            text, read = codecs.utf_8_decode(self._rest + byte, "strict", False)
        except UnicodeDecodeError:
            self._broken = True
            return (UNKNOWN,) * self._bytes
        self._text += text
        self._rest = (self._rest + byte)[read:]
        return ()

    def held(self) -> Sequence[str]:
        return (self._text,) if self._text and not self._broken else ()

    def _end_run(self) -> Sequence[str]:
        """The pieces of the run that have not been given yet."""
        run: Sequence[str] = ()
        if self._bytes and not self._broken:
            run = (UNKNOWN,) * self._bytes if self._rest else (self._text,)
        self._bytes, self._text, self._rest, self._broken = 0, "", b"", False
        return run


class AllBytes:
    """`ByteLevel`: every character of a piece stands for a byte, and the bytes of all pieces are the text."""

    def __init__(self) -> None:
        self._rest = b""  # of an incomplete character

    def push(self, piece: str) -> Sequence[str]:
        data = self._rest + byte_level(piece)
        text, read = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[read:]
        return (text,) if text else ()

    def held(self) -> Sequence[str]:
        return ()


class WithoutStart:
    """`Strip` of a whole text: removes up to `count` times a character from its beginning."""

    def __init__(self, character: str, count: int) -> None:
        self._character, self._left = character, count

    def push(self, piece: str) -> Sequence[str]:
        cut = 0
        while cut < min(self._left, len(piece)) and piece[cut] == self._character:
            cut += 1
        self._left = self._left - cut if cut == len(piece) else 0
        return (piece[cut:],) if cut < len(piece) else ()

    def held(self) -> Sequence[str]:
        return ()


@dataclass(frozen=True, slots=True)
class DecoderKind:
    """A decoder of a chain, from which the stage of each text is made.

    Attributes:
        make: Makes the stage of a new text.
        inside: What a piece in the middle of a text gives: a text, or bytes.
        joins: Whether its pieces are parts of one text and no longer of one token each.
    """

    make: Callable[[], DecoderStage]
    inside: Callable[[str], str | bytes]
    joins: bool = False


def decoder_kinds(decoder: Any) -> list[DecoderKind] | None:
    """The stages of a tokenizer's decoder; None if it may change text however late.

    Args:
        decoder: `Tokenizer.decoder`, which is None for tokens that are joined by spaces.
    """
    if decoder is None:
        return [_each(lambda piece: piece, lambda piece: f" {piece}")]
    try:
        described = _flat(json.loads(decoder.__getstate__()))
    except Exception:  # a decoder in Python has no JSON
        return None
    kinds: list[DecoderKind] = []
    joined = False
    for one in described:
        kind = _in_joined_text(one) if joined else _of_tokens(one)
        if kind is None:
            return None
        kinds.append(kind)
        joined = joined or kind.joins
    return kinds


def byte_of(piece: str) -> bytes | None:
    """The byte of a piece like `<0xE4>`, else None."""
    found = _BYTE.fullmatch(piece)
    return None if found is None else bytes([int(found[1], 16)])


def byte_level(piece: str) -> bytes:
    """The bytes of a piece of a byte-level tokenizer; its UTF-8 if a character of it stands for no byte."""
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode()


def _flat(described: dict[str, Any]) -> list[dict[str, Any]]:
    """The decoders of nested sequences, in order."""
    if described["type"] != "Sequence":
        return [described]
    return [one for inner in described["decoders"] for one in _flat(inner)]


def _of_tokens(described: dict[str, Any]) -> DecoderKind | None:
    """The stage of a decoder whose pieces are still tokens."""
    decode = _decoder(described)
    match described["type"]:
        case "ByteLevel":
            return DecoderKind(AllBytes, byte_level, joins=True)
        case "ByteFallback":
            return DecoderKind(ByteRuns, lambda piece: byte_of(piece) or piece)
        case "Fuse":
            return DecoderKind(lambda: EachPiece(str, str), str, joins=True)
        case "Replace" | "Strip":
            alone = lru_cache(_CACHED)(lambda piece: decode([piece]))
            return _each(alone, alone)
        case "Metaspace" | "WordPiece":
            skipped = len(decode([""]))
            return _each(lambda piece: decode([piece]), lambda piece: decode(["", piece])[skipped:])
        case "BPEDecoder":
            added = len(decode([""]))
            inner = lru_cache(_CACHED)(lambda piece: _without_end(decode([piece, ""]), added))
            return DecoderKind(lambda: LastPieceApart(inner, lambda piece: decode([piece])), inner)
    return None


def _in_joined_text(described: dict[str, Any]) -> DecoderKind | None:
    """The stage of a decoder whose pieces are parts of one text."""
    match described:
        case {"type": "Fuse"}:
            return DecoderKind(lambda: EachPiece(str, str), str)
        case {"type": "Strip", "content": str(character), "start": int(count), "stop": 0}:
            return DecoderKind(lambda: WithoutStart(character, count), str)
        case {"type": "Replace", "pattern": {"String": str(pattern)}} if len(pattern) == 1:
            decode = _decoder(described)
            alone = lru_cache(_CACHED)(lambda piece: decode([piece]))
            return _each(alone, alone)
    return None


def _each(first: Change, later: Change) -> DecoderKind:
    kept = later if hasattr(later, "cache_info") else lru_cache(_CACHED)(later)
    return DecoderKind(lambda: EachPiece(first, kept), kept)


def _without_end(text: str, length: int) -> str:
    return text[: len(text) - length]


def _decoder(described: dict[str, Any]) -> Callable[[list[str]], str]:
    """The library's own decoder of this description."""
    made: Any = decoders.Fuse()
    made.__setstate__(json.dumps(described).encode())
    decode: Callable[[list[str]], str] = made.decode
    return decode


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves, the other bytes in order for U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + at): byte for at, byte in enumerate(others)},
    }


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
_BYTE_OF = _byte_characters()

__all__ = ["UNKNOWN", "DecoderKind", "DecoderStage", "byte_level", "byte_of", "decoder_kinds"]
