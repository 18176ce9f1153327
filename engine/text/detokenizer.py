"""Decoding of tokens: together to a text that grows token by token, and each by itself to its bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import copy
from typing import Protocol

from tokenizers import Tokenizer

from engine.text.decoder_stages import UNKNOWN, DecoderKind, DecoderStage, decoder_kinds
from errors import DataError

_TRIALS, _TRIAL_TOKENS = 24, 24
_LOW_IDS = 512  # bytes and special tokens have low ids in most vocabularies


class GrowingText(Protocol):
    """The text of tokens that are taken one by one."""

    def feed(self, token: int) -> str:
        """Take a token; the text that has become certain, which no later token changes."""
        ...

    def uncertain(self) -> str:
        """The text that would follow if no token did, without an incomplete character at its end."""
        ...


class Detokenizer:
    """Decodes tokens as `Tokenizer.decode` does.

    The tokenizer's decoder is taken apart into stages, so that each token costs the same however long the
    text is. A decoder that is unknown, or that turns out to differ, decodes the whole text at its end.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._kinds: list[DecoderKind] | None = decoder_kinds(tokenizer.decoder)
        if self._kinds is not None and not self._agrees(self._kinds):
            self._kinds = None
        self._bytes: dict[int, bytes] = {}

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens.

        Args:
            special: Whether special tokens have a text.

        Raises:
            DataError: The tokenizer cannot decode them.
        """
        try:
            text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=not special)
        except BaseException as error:
            raise _undecodable(error) from None
        return text

    def begin(self, *, special: bool = False) -> GrowingText:
        """An empty text.

        Args:
            special: Whether special tokens have a text.
        """
        if self._kinds is None:
            return _WholeText(self, special)
        return _StagedText(self, self._kinds, special)

    def piece(self, token: int, *, special: bool) -> str | None:
        """The string of a token; None for an unknown one, and for a special one unless `special`."""
        piece: str | None = self._tokenizer.id_to_token(token)
        return None if piece in self._special and not special else piece

    def own_bytes(self, token: int) -> bytes:
        """The bytes of a token in the middle of a text; those of an incomplete character as they are."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._find_bytes(token)
        return found

    def _find_bytes(self, token: int) -> bytes:
        if self._kinds is None:
            return self.decode([token], special=True).encode()
        found: str | bytes = self.piece(token, special=True) or ""
        for kind in self._kinds:
            if isinstance(found, str) and found:
                found = kind.inside(found)
        return found.encode() if isinstance(found, str) else found

    def _agrees(self, kinds: list[DecoderKind]) -> bool:
        """Whether the stages give the beginnings of the library's texts, for random tokens."""
        source = random.Random(0)
        size = self._tokenizer.get_vocab_size()
        for trial in range(_TRIALS):
            among = min(size, _LOW_IDS) if trial % 2 else size
            tokens = [source.randrange(max(1, among)) for _ in range(_TRIAL_TOKENS)]
            text = _StagedText(self, kinds, special=False)
            try:
                certain = "".join(map(text.feed, tokens))
                if not self.decode(tokens).startswith(certain):
                    return False
            except DataError:  # each request that has such tokens is told
                continue
        return True


class _StagedText:
    """A text that a chain of stages decodes."""

    def __init__(self, detokenizer: Detokenizer, kinds: Sequence[DecoderKind], special: bool) -> None:
        self._detokenizer, self._special = detokenizer, special
        self._stages: list[DecoderStage] = [kind.make() for kind in kinds]

    def feed(self, token: int) -> str:
        piece = self._detokenizer.piece(token, special=self._special)
        if piece is None:
            return ""
        pieces: Sequence[str] = (piece,)
        try:
            for stage in self._stages:
                pieces = _pushed(stage, pieces)
                if not pieces:
                    return ""
        except BaseException as error:
            raise _undecodable(error) from None
        return "".join(pieces)

    def uncertain(self) -> str:
        pieces: Sequence[str] = ()
        for stage in self._stages:
            if pieces:
                ahead = copy(stage)
                pieces = (*_pushed(ahead, pieces), *ahead.held())
            else:
                pieces = stage.held()
        return "".join(pieces)


class _WholeText:
    """A text that is decoded as a whole each time, since any of its tokens may change all of it."""

    def __init__(self, detokenizer: Detokenizer, special: bool) -> None:
        self._detokenizer, self._special = detokenizer, special
        self._tokens: list[int] = []

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        return ""

    def uncertain(self) -> str:
        return self._detokenizer.decode(self._tokens, special=self._special).rstrip(UNKNOWN)


def _undecodable(error: BaseException) -> DataError:
    """What is raised for an error of the library, whose panics are no `Exception`."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    return DataError(
        f"the tokenizer cannot decode the tokens ({type(error).__name__}: {error}); check the decoder in its"
        " tokenizer.json"
    )


def _pushed(stage: DecoderStage, pieces: Sequence[str]) -> Sequence[str]:
    if len(pieces) == 1:
        return stage.push(pieces[0])
    return [out for piece in pieces for out in stage.push(piece)]


__all__ = ["Detokenizer", "GrowingText"]
