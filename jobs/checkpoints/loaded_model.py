"""Loads a trained model, with its experts and tokenizer, into one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from jobs.checkpoints.checkpoint_store import find_weights
from jobs.checkpoints.memory_need import check_memory, loading_need
from jobs.config.device_and_dtype import computes_bfloat16
from jobs.data.tokenizer import ModelTokenizer, load_tokenizer
from model.checkpoints.expected_tensors import described, stored_dtype
from model.checkpoints.pretrained import PretrainedSource, ShardReader, load_pretrained
from model.experts.local import LocalExperts
from model.transformer import Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in one process.

    Attributes:
        directory: The directory that it was loaded from.
        transformer: The trunk, with its configuration in `.config`.
        experts: All routed experts.
        text: The tokenizer from the same directory, with the roles of its tokens.
    """

    directory: Path
    transformer: Transformer
    experts: LocalExperts
    text: ModelTokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer alone."""
        return self.text.tokenizer


def load_model(path: Path, *, note: Callable[[str], None] | None = None) -> LoadedModel:
    """Load a checkpoint, the latest one of a run, or a Hugging Face directory, for evaluation.

    Weights keep their dtype if the machine computes in it, else they become float32.

    Args:
        path: A checkpoint, a run's directory, or a Hugging Face directory.
        note: Called with a line that names the checkpoint's unused tensors, if there are any.

    Raises:
        CheckpointError: The weights are missing, damaged or of another architecture.
        DataError: There is no tokenizer.json beside the weights.
        ResourceError: The model is larger than the free memory.
    """
    directory = find_weights(path)
    dtype = compute_dtype(directory)
    source = PretrainedSource(directory)
    note_unused(source, note or (lambda _: None))
    check_memory(
        loading_need(source.config, dtype),
        advice="use a machine with more, or raymoe serve with cluster.expert_hosts on several machines",
    )
    text = load_tokenizer(directory, source.config.vocab_size)
    model = load_pretrained(directory, dtype=dtype).eval()
    return LoadedModel(
        directory=directory,
        transformer=model.trunk,
        experts=model.experts,
        text=text,
    )


def note_unused(source: PretrainedSource, note: Callable[[str], None]) -> None:
    """Call `note` with a line that names a checkpoint's unused tensors, if there are any."""
    if source.unused:
        note(f"{source.directory} has tensors that the model does not use: {described(source.unused)}")


def compute_dtype(directory: Path, *, on_gpus: bool = False) -> torch.dtype:
    """The dtype to run a model in: that of its weights if the device computes in it, else float32.

    Raises:
        CheckpointError: The weights are missing or damaged.
    """
    stored = stored_dtype(ShardReader(directory))
    keeps = stored == torch.float64 or (stored == torch.bfloat16 and (on_gpus or computes_bfloat16()))
    return stored if keeps else torch.float32


__all__ = ["LoadedModel", "compute_dtype", "load_model", "note_unused"]
