"""The text of a request, decoded from its tokens one by one and ended at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from engine.text.detokenizer import Detokenizer
from engine.text.stop_strings import StopStrings
from errors import DataError


class TextStream:
    """The text of one request, released as soon as it is certain.

    Whatever later tokens may change is held back: the bytes of an incomplete character, text whose decoding
    depends on the next token, and an end of the text that a stop string may begin with. All parts together
    are what `Tokenizer.decode` makes of all tokens, up to the stop string.

    Args:
        detokenizer: Decodes tokens; special tokens have no text.
        stops: Strings that end the text and do not belong to it.
        min_tokens: Number of tokens before which stop strings are ignored.

    Attributes:
        stopped: Whether a stop string has ended the text.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._growing = detokenizer.begin()
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._released: list[str] = []
        self._kept = ""  # certain, and not released
        self._searched_from = 0  # position in the text after what is released
        self.stopped = False

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._released)

    def feed(self, token: int) -> str:
        """Take a token and return the text that has become certain; empty after a stop string.

        Raises:
            DataError: The tokenizer cannot decode it.
        """
        if self.stopped:
            return ""
        self._tokens.append(token)
        self._kept += self._growing.feed(token)
        if not self._stops:
            return self._release(len(self._kept))
        seen = self._kept + self._growing.uncertain()
        if len(self._tokens) < self._min_tokens:
            self._searched_from = len(seen)
        return self._release(self._end_at_stop_string(seen))

    def finish(self) -> str:
        """The rest of the text, when no token will follow.

        Raises:
            DataError: The tokenizer cannot decode the tokens, or not to a text that begins as released.
        """
        if self.stopped:
            return ""
        whole, released = self._detokenizer.decode(self._tokens), self.text
        if not whole.startswith(released):
            raise DataError(
                f"the tokenizer decodes {len(self._tokens)} tokens to another text than their beginning;"
                " its decoder cannot be used to generate text"
            )
        self._kept = whole[len(released) :]
        self._end_at_stop_string(self._kept)
        return self._release(len(self._kept))

    def _release(self, end: int) -> str:
        """Release the certain text up to `end`, and drop it from what is kept."""
        new = self._kept[:end]
        if new:
            self._released.append(new)
            self._kept = self._kept[end:]
            self._searched_from = max(0, self._searched_from - end)
        return new

    def _end_at_stop_string(self, seen: str) -> int:
        """End what is not released at the first stop string; the length of what is certain of it."""
        at = self._stops.find(seen, self._searched_from)
        if at is None:
            both = {seen, self._kept}  # what is uncertain may complete a stop string, or become another text
            return min(self._stops.certain_length(text, self._searched_from) for text in both)
        self.stopped = True
        self._kept = seen[:at]
        return at


__all__ = ["TextStream"]
