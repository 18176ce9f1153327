"""`raymoe generate`: a text continued in one process, by a full forward pass for each token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.sampling import next_token
from errors import DataError
from jobs.weights import LoadedModel, load_model


def generate(
    checkpoint: Path,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Continue a prompt; the same arguments give the same text.

    Returns:
        prompt, text (what was generated), tokens, finish_reason (`stop` at the end of the text, `length`
        at `max_tokens` or at the longest text the model takes), tokens_per_second.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged.
        DataError: the prompt leaves no room.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(checkpoint)
    ids = model.tokenizer.encode(prompt, add_special_tokens=False).ids
    began = time.perf_counter()
    new, reason = continue_tokens(model, ids, max_tokens=max_tokens, temperature=temperature, seed=seed)
    return {
        "prompt": prompt,
        "text": model.tokenizer.decode(new),
        "tokens": len(new),
        "finish_reason": reason,
        "tokens_per_second": len(new) / (time.perf_counter() - began),
        "checkpoint": str(model.directory),
    }


@torch.no_grad()
def continue_tokens(
    model: LoadedModel, prompt: Sequence[int], *, max_tokens: int, temperature: float, seed: int
) -> tuple[list[int], str]:
    """Tokens after the prompt, without the end of text, and why they end."""
    # An empty prompt begins where one document ends and the next one begins.
    ids = list(prompt) or [model.end_of_text]
    longest = model.transformer.config.max_position_embeddings
    if len(ids) > longest:
        raise DataError(
            f"--prompt has {len(ids)} tokens, the model takes {longest} (max_position_embeddings); shorten it"
        )
    generator = torch.Generator().manual_seed(seed)
    known = model.tokenizer.get_vocab_size()  # The model may have more rows than the tokenizer has tokens.
    new: list[int] = []
    while len(new) < max_tokens and len(ids) <= longest:
        tokens = torch.tensor([ids])
        hidden = model.transformer.hidden_states(tokens, experts=model.experts).normed[0, -1]
        logits = model.transformer.logits(hidden)[:known]
        token = int(next_token(logits, temperature=temperature, generator=generator))
        if token == model.end_of_text:
            return new, "stop"
        ids.append(token)
        new.append(token)
    return new, "length"


__all__ = ["continue_tokens", "generate"]
