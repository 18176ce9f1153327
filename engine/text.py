"""The text of a request, decoded from its tokens one by one and ended at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from engine.stop_strings import StopStrings


class TextStream:
    """The text of one request, released as soon as it is certain.

    The bytes of an incomplete character are held back, and so is an end of the text that a stop string may
    begin with.

    Args:
        tokenizer: Decodes tokens; special tokens have no text.
        stops: Strings that end the text and do not belong to it.
        min_tokens: Number of tokens before which stop strings are ignored.

    Attributes:
        stopped: Whether a stop string has ended the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._text = ""
        self._released = 0
        self._searched_from = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text released so far."""
        return self._text[: self._released]

    def feed(self, token: int) -> str:
        """Take a token and return the text that has become certain; empty after a stop string."""
        self._tokens.append(token)
        self._text += self._stream.step(self._tokenizer, token) or ""
        if len(self._tokens) < self._min_tokens:
            self._searched_from = len(self._text)
        return self._release(self._end_at_stop_string())

    def finish(self) -> str:
        """The rest of the text, when no token will follow."""
        if not self.stopped:
            whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            if whole.startswith(self._text):  # adds an incomplete character at the end
                self._text = whole
                self._end_at_stop_string()
        return self._release(len(self._text))

    def _release(self, end: int) -> str:
        new = self._text[self._released : end]
        self._released = max(self._released, end)
        return new

    def _end_at_stop_string(self) -> int:
        """Cut the text at the first stop string; the length of the text that is certain."""
        if not self._stops:
            return len(self._text)
        at = self._stops.find(self._text, self._searched_from)
        if at is not None:
            self._text = self._text[:at]
            self.stopped = True
            return at
        return max(self._stops.certain_length(self._text, self._searched_from), self._released)


__all__ = ["TextStream"]
