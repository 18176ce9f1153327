"""Stop strings in a text that grows token by token; a stop string may span several tokens.

The text of a request is searched as a whole and not token by token, so it does not matter where tokens begin
and end. A suffix of the text that is a prefix of a stop string is held back until the next token.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The stop strings of one request.

    Args:
        stops: Strings that end the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)

    def __bool__(self) -> bool:
        """Whether there is any stop string."""
        return bool(self._stops)

    def find(self, text: str, start: int) -> int | None:
        """Position of the first stop string in `text[start:]`, or None."""
        found = [at for stop in self._stops if (at := text.find(stop, start)) >= 0]
        return min(found, default=None)

    def certain_length(self, text: str, start: int) -> int:
        """Length of the text without an end that may be the beginning of a stop string.

        Args:
            text: Text without a stop string after `start`.
            start: Position before which no stop string begins.
        """
        certain = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(start, len(text) - len(stop) + 1), certain)
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1, certain)
            if at >= 0:
                certain = at
        return certain


__all__ = ["StopStrings"]
