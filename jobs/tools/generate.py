"""`raymoe generate`: continues a text with an engine in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine import Engine, EngineSettings, SamplingParams, TrunkWeights
from errors import DataError
from jobs.checkpoints.loaded_model import LoadedModel, load_model

_PAGE = 64


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
        prompt, text (the generated text), tokens, finish_reason (`stop` at the end of the text, `length`
        at `max_tokens` or at the model's longest text), tokens_per_second.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        DataError: The prompt is not UTF-8, or too long.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        raise DataError("--prompt is not UTF-8; convert it, for instance with iconv") from None
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


def continue_tokens(
    model: LoadedModel, prompt: Sequence[int], *, max_tokens: int, temperature: float, seed: int
) -> tuple[list[int], str]:
    """Tokens after the prompt, without the end of text, and the reason why they end.

    Raises:
        DataError: The prompt is too long.
    """
    # An empty prompt becomes the end-of-text token, which precedes every document.
    ids = list(prompt) or [model.end_of_text]
    longest = model.transformer.config.max_position_embeddings
    if len(ids) >= longest:
        raise DataError(
            f"--prompt has {len(ids)} tokens, and the model takes {longest} together with what it writes"
            " (max_position_embeddings); shorten it"
        )
    most = min(longest, len(ids) + max_tokens)
    engine = Engine(
        TrunkWeights.of(model.transformer),
        model.experts,
        EngineSettings(cache_tokens=-(-most // _PAGE) * _PAGE, page_size=_PAGE, max_sequences=1),
        end_of_text=[model.end_of_text],
        vocabulary=model.tokenizer.get_vocab_size(),  # the model's embedding may be larger
    )
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    sequence = engine.add("generate", ids, params)
    while engine.has_work:
        engine.step()
    new = [token for token in sequence.output if token != model.end_of_text]
    return new, sequence.finish_reason or "length"


__all__ = ["continue_tokens", "generate"]
