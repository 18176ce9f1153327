"""From tokens to text as it grows, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one request, given out as soon as it is certain.

    Bytes of a character that is not whole yet are held back, and so is what a stop string may begin with.

    Args:
        tokenizer: turns tokens into text; special ones into none.
        stops: strings that end the text and are not part of it.
        min_tokens: tokens up to which no stop string counts.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._text = ""
        self._given = 0
        self._judged = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All that has been given out."""
        return self._text[: self._given]

    def feed(self, token: int) -> str:
        """Take a token; the text that is certain now. After a stop string there is no more."""
        self._tokens.append(token)
        self._text += self._stream.step(self._tokenizer, token) or ""
        if len(self._tokens) < self._min_tokens:
            self._judged = len(self._text)
        return self._give(self._certain())

    def finish(self) -> str:
        """The rest, when no token will follow."""
        if not self.stopped:
            whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            if whole.startswith(self._text):  # a character that was cut in two
                self._text = whole
                self._certain()
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        new = self._text[self._given : end]
        self._given = max(self._given, end)
        return new

    def _certain(self) -> int:
        """How much of the text can be given out; cuts it where it ends."""
        found = [at for stop in self._stops if (at := self._text.find(stop, self._judged)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
            return len(self._text)
        end = len(self._text)
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._text) - self._judged), 0, -1):
                if self._text.endswith(stop[:size]):
                    end = min(end, len(self._text) - size)
                    break
        return max(end, self._given)


__all__ = ["TextStream"]
