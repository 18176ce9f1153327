"""Log probabilities in OpenAI's two formats, with the text and the bytes of every token by itself.

A token that is no whole character has no text of its own. The completions format then gives its bytes as
`bytes:\\xe4`, as OpenAI's server does, and the chat format as `\\xe4` beside the list of numbers.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from engine.sequence import TokenLogprobs
from engine.text import Detokenizer


class TextOffsets:
    """Positions of tokens in a text that they are the next tokens of.

    A token is where the character begins that its first byte belongs to. Its position does not depend on
    later tokens: where these turn bytes into unknown characters (`ByteFallback`), the bytes' positions stay.

    Args:
        detokenizer: Decodes the tokens.
        special: Whether special tokens have a text.
        start: Number of characters before the text.
    """

    def __init__(self, detokenizer: Detokenizer, *, special: bool = False, start: int = 0) -> None:
        self._detokenizer = detokenizer
        self._text = detokenizer.begin(special=special)
        self._certain = self._length = start

    def take(self, tokens: Sequence[int]) -> list[int]:
        """The positions of the next tokens."""
        found: list[int] = []
        for token in tokens:
            before = self._length
            self._certain += len(self._text.feed(token))
            self._length = self._certain + len(self._text.uncertain())
            # Bytes before the token that were an incomplete character may have become unknown ones by it.
            own, _ = codecs.utf_8_decode(self._detokenizer.own_bytes(token), "replace", False)
            found.append(max(before, self._length - len(own)))
        return found


def completion_logprobs(
    detokenizer: Detokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """Log probabilities in the format of `/v1/completions`: parallel lists.

    Args:
        offsets: Positions of the tokens in the text.
    """
    return {
        "tokens": [_completion_text(detokenizer, token) for token in tokens],
        "token_logprobs": [None if at is None else at.token for at in logprobs],
        "top_logprobs": [
            None if at is None else _by_text(detokenizer, token, at)
            for token, at in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": list(offsets),
    }


def chat_logprobs(
    detokenizer: Detokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """Log probabilities in the format of `/v1/chat/completions`: one object for each token."""
    return {
        "content": [
            {
                **_chat_entry(detokenizer, token, at.token),
                "top_logprobs": [_chat_entry(detokenizer, other, value) for other, value in at.best],
            }
            for token, at in zip(tokens, logprobs, strict=True)
        ]
    }


def _by_text(detokenizer: Detokenizer, token: int, at: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens and the token itself by their texts.

    Of tokens with equal texts, the token itself keeps the text, then the likeliest; the others are told apart
    by their bytes if that is enough, else by their ids, as vLLM writes them.
    """
    taken = {_completion_text(detokenizer, token)}
    found: dict[str, float] = {}
    for other, value in [*at.best, *([] if any(token == one for one, _ in at.best) else [(token, at.token)])]:
        name = _completion_text(detokenizer, other)
        if other != token and name in taken:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in detokenizer.own_bytes(other))
            if name in taken:
                name = f"token_id:{other}"
        taken.add(name)
        found[name] = value
    return found


def _completion_text(detokenizer: Detokenizer, token: int) -> str:
    data = detokenizer.own_bytes(token)
    text = _as_text(data)
    return f"bytes:{_escaped(data)}" if text is None else text


def _chat_entry(detokenizer: Detokenizer, token: int, value: float) -> dict[str, Any]:
    data = detokenizer.own_bytes(token)
    text = _as_text(data)
    return {"token": _escaped(data) if text is None else text, "logprob": value, "bytes": list(data)}


def _as_text(data: bytes) -> str | None:
    """The text of whole characters; None if the bytes begin or end within one."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _escaped(data: bytes) -> str:
    """Bytes as printable ASCII, the others as `\\xe4`."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in data)


__all__ = ["TextOffsets", "chat_logprobs", "completion_logprobs"]
