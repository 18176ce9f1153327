"""From logits to the next token: pure functions, the randomness coming in from outside.

V is the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Distribution of the next token [..., V] float32 for logits [..., V].

    A temperature of 0 puts everything on the likeliest token, the first one on a tie.
    """
    if temperature < 0:
        raise ValueError(f"temperature ({temperature}) must not be negative")
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    return torch.softmax(logits.float() / temperature, dim=-1)


def next_token(
    logits: Tensor, *, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the next token [...] int64 for logits [..., V].

    Args:
        temperature: 0 is greedy and takes nothing from the generator.
        generator: the source of randomness; torch's default one when None.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights = probabilities(logits, temperature)
    flat = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1, generator=generator)
    return flat.view(weights.shape[:-1])


__all__ = ["next_token", "probabilities"]
