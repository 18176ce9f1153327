"""What a request gets from the engine: new tokens and text, until one says why it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.sequence import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens and text of a request.

    Attributes:
        text: Text that has become certain.
        tokens: New tokens, including a token that ended the text.
        logprobs: Log probabilities of these tokens, if requested.
        prompt_logprobs: Log probabilities of the prompt, if requested; with the first delta.
        finish_reason: `stop`, `length` or `abort` in the last delta, otherwise None.
        error: Error text that ends the request, in place of a finish_reason.
        own: Whether the error belongs to this request, so that a retry fails in the same way.
        cached: Positions of the prompt that were found in the cache.
        version: Version of the weights that computed the tokens.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    own: bool = False
    cached: int = 0
    version: str = ""


Listener = Callable[[Delta], None]

__all__ = ["Delta", "Listener"]
