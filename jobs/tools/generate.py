"""`raymoe generate`: continues a text with an engine in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.engine import Engine
from engine.few_rows import FewRowsRunner
from engine.params import SamplingParams
from engine.settings import EngineSettings
from engine.weights import TrunkWeights
from errors import DataError
from jobs.checkpoints.checkpoint_store import find_weights
from jobs.checkpoints.generation_defaults import GenerationDefaults, GenerationSource
from jobs.checkpoints.loaded_model import LoadedModel, load_model

_PAGE = 64
_MAX_TOKENS = 128


def generate(
    checkpoint: Path,
    prompt: str,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    generation_config: GenerationSource = "auto",
    threads: int | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt; the same arguments give the same text.

    Args:
        checkpoint: A checkpoint, a run's directory, or a Hugging Face directory.
        prompt: The text to continue; special tokens that it spells are these tokens.
        max_tokens: Largest number of tokens; None takes generation_config.json's max_new_tokens, else 128.
        temperature: Sampling temperature; None takes generation_config.json's, else 0, which is greedy.
        seed: Seed of the sampling.
        generation_config: Whether the model's generation_config.json gives further sampling parameters.
        threads: Compute threads; None takes one for each core.
        note: Called with what takes long, and with what should be known about the checkpoint and the
            arguments, one line at a time.

    Returns:
        prompt, text (the generated text), tokens, finish_reason (`stop` at the end of the text, `length`
        at `max_tokens` or at the model's longest text), tokens_per_second.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        DataError: The prompt is too long, the tokenizer cannot encode it, or a file beside the weights is
            damaged.
    """
    note = note or (lambda _: None)
    if threads is not None:
        torch.set_num_threads(threads)
    defaults = GenerationDefaults.of(find_weights(checkpoint), generation_config)
    model = load_model(checkpoint, note=note)
    ids = model.text.prompt(prompt)
    _tell(model, len(ids), max_tokens, note)
    began = time.perf_counter()
    new, reason = continue_tokens(
        model,
        ids,
        max_tokens=max_tokens or defaults.max_tokens or _MAX_TOKENS,
        temperature=defaults.temperature if temperature is None else temperature,
        seed=seed,
        defaults=defaults,
    )
    return {
        "prompt": prompt,
        "text": _continuation(model, ids, new),
        "tokens": len(new),
        "finish_reason": reason,
        "tokens_per_second": len(new) / (time.perf_counter() - began),
        "checkpoint": str(model.directory),
    }


def _tell(model: LoadedModel, size: int, max_tokens: int | None, note: Callable[[str], None]) -> None:
    """Tell that the asked number of tokens is cut, and that functions are compiled.

    Args:
        size: Tokens of the prompt.
        max_tokens: What was asked for; None for a default, which may be cut without a word.
    """
    longest = model.transformer.config.max_position_embeddings
    if max_tokens is not None and 0 < longest - size < max_tokens:
        note(
            f"--max-tokens is cut from {max_tokens:,} to {longest - size:,}: the model takes {longest:,} "
            "tokens, the prompt and its continuation together (max_position_embeddings)"
        )
    if FewRowsRunner.takes(TrunkWeights.of(model.transformer), _PAGE) and not FewRowsRunner.is_compiled():
        note("compiling the functions that generate, once; this takes about ten seconds")


def continue_tokens(
    model: LoadedModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    defaults: GenerationDefaults | None = None,
) -> tuple[list[int], str]:
    """Tokens after the prompt, without the end token, and the reason why they end.

    Raises:
        DataError: The prompt is too long.
    """
    ids = list(prompt)
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
        end_of_text=list(model.text.ends),
        vocabulary=model.text.vocabulary,  # the model's embedding may be larger
    )
    given = {} if defaults is None else defaults.values
    params = SamplingParams(**{**given, "max_tokens": max_tokens, "temperature": temperature, "seed": seed})
    sequence = engine.add("generate", ids, params)
    while engine.has_work:
        engine.step()
    new = [token for token in sequence.output if token not in model.text.ends]
    return new, sequence.finish_reason or "length"


def _continuation(model: LoadedModel, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens after their prompt; at the beginning of a text some decoders drop a space."""
    before = model.tokenizer.decode(list(prompt))
    whole: str = model.tokenizer.decode([*prompt, *new])
    if whole.startswith(before):
        return whole[len(before) :]
    alone: str = model.tokenizer.decode(list(new))
    return alone


__all__ = ["continue_tokens", "generate"]
