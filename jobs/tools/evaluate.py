"""`raymoe eval`: evaluates a model on documents, in one process and without Ray."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from errors import CheckpointError, ConfigError, DataError
from jobs.checkpoints.checkpoint_store import find_weights, read_state, run_config
from jobs.checkpoints.loaded_model import LoadedModel, load_model
from jobs.config.run_config import RunConfig
from jobs.console import counted
from jobs.data.documents import held_out, read_documents
from jobs.data.held_out import HeldOut, zlib_bits_per_byte
from jobs.data.packing import pack
from jobs.data.source_files import find_files
from jobs.data.tokenizer import opening_length
from model.losses.training_losses import evaluation_loss

_LENGTH = 1024  # tokens of a row for weights without a run


def evaluate(
    checkpoint: Path,
    data: str | None = None,
    *,
    text_field: str | None = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    threads: int | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on all documents of `data`, or on those that its run held out.

    Args:
        checkpoint: A checkpoint, a run's directory, or a Hugging Face directory.
        data: A file, folder or glob; None takes the documents that the run held out.
        text_field: Field or column with the text; None takes the run's.
        sequence_length: Tokens of a row; None takes the run's.
        batch_size: Rows of a forward pass.
        threads: Compute threads; None takes one for each core.
        note: Called with a description before each part that takes long.

    Returns:
        loss (nats per token), perplexity, bits_per_byte, zlib_bits_per_byte, mtp_acceptance (for each MTP
        module, the share of its greedy drafts that the main model agrees with), and counts.

    Raises:
        CheckpointError: There is no such checkpoint.
        DataError: There are no such documents, or neither `data` nor a run is given.
    """
    note = note or (lambda _: None)
    if threads is not None:
        torch.set_num_threads(threads)
    directory = find_weights(checkpoint)
    run = _run_of(directory)
    with _options_named(given=data is not None):
        texts = documents_of(directory, data, text_field=text_field, note=note)
    model = load_model(directory, note=note)
    limit = model.transformer.config.max_position_embeddings
    length = sequence_length or min(run.training.sequence_length if run else _LENGTH, limit)
    if length > limit:
        raise ConfigError(
            f"--sequence-length ({length}) is beyond the model's max_position_embeddings ({limit}); lower it"
        )
    note(f"judging {counted(len(texts), 'document')}")
    return judge(model, texts, sequence_length=length, batch_size=batch_size)


def judge(model: LoadedModel, texts: list[str], *, sequence_length: int, batch_size: int) -> dict[str, Any]:
    """Evaluate every token of the texts once, with its own document as context."""
    depth = model.transformer.config.num_nextn_predict_layers
    rows = pack(
        model.text.documents(texts),
        sequence_length=sequence_length,
        depth=depth,
        end_of_text=model.text.end_of_text,
        pad=True,
    )
    judged = HeldOut(
        rows=rows,
        documents=len(texts),
        size=sum(len(text.encode()) for text in texts),
        zlib_bits_per_byte=zlib_bits_per_byte(texts),
        begun=opening_length(model.tokenizer) > 0,
    )
    nats, targets = 0.0, 0
    accepted, drafted = [0] * depth, [0] * depth
    for start in range(0, rows.n_rows, batch_size):
        tokens, segments = rows.rows(range(start, min(start + batch_size, rows.n_rows)))
        found = evaluation_loss(
            model.transformer,
            torch.from_numpy(tokens).long(),
            torch.from_numpy(segments),
            experts=model.experts,
        )
        nats, targets = nats + found.nll, targets + found.n_targets
        accepted = [a + b for a, b in zip(accepted, found.accepted, strict=True)]
        drafted = [a + b for a, b in zip(drafted, found.drafted, strict=True)]
    loss = nats / max(1, targets)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": judged.bits_per_byte(nats, model.transformer.config.vocab_size),
        "zlib_bits_per_byte": judged.zlib_bits_per_byte,
        "mtp_acceptance": [a / max(1, d) for a, d in zip(accepted, drafted, strict=True)],
        "tokens": targets,
        "documents": judged.documents,
        "bytes": judged.size,
        "sequence_length": sequence_length,
        "checkpoint": str(model.directory),
    }


def documents_of(
    directory: Path, data: str | None, *, text_field: str | None = None, note: Callable[[str], None]
) -> list[str]:
    """The documents of `data`, or those that the run of a checkpoint held out.

    Raises:
        DataError: There are no such documents, or neither `data` nor a run is given.
    """
    run = _run_of(directory)
    if data is None and run is None:
        raise DataError(f"{directory} holds weights without a run, and so no held-out documents; give --data")
    return _texts(data, text_field, run, note)


def _run_of(directory: Path) -> RunConfig | None:
    """The configuration of the run that wrote a checkpoint; None for weights alone."""
    try:
        return run_config(directory, read_state(directory))
    except CheckpointError:
        if (directory / "state.json").exists():
            raise
        return None


@contextmanager
def _options_named(*, given: bool) -> Iterator[None]:
    """Name the command's options in an error, in place of the fields of a run's configuration.

    Args:
        given: Whether the documents are those of `--data`, not of the run.
    """
    try:
        yield
    except DataError as error:
        text = str(error).replace("; set data.text_field", "; set --text-field")
        if given:
            text = re.sub(r"^data\.path:", "--data:", text)
            text = text.replace(", or set data.on_bad_record=skip", "")  # the run's alone, and no option
        raise DataError(text) from None


def _texts(
    data: str | None, text_field: str | None, run: RunConfig | None, note: Callable[[str], None]
) -> list[str]:
    field = text_field or (run.data.text_field if run else "text")
    given = data if data is not None else run.data.path if run else None
    files = find_files(given)
    note(f"reading {counted(len(files), 'file')}")
    problems: list[str] = []
    skipped = problems.append if run is not None and run.data.on_bad_record == "skip" else None
    documents = [document for file in files for document in read_documents(file, field, skipped=skipped)]
    if problems:
        note(f"skipped {counted(len(problems), 'record')} that cannot be read, such as {problems[0]}")
    if data is None and run is not None:
        names = held_out(
            [document.name for document in documents], run.data.validation_fraction, path=run.data.path
        )
        documents = [document for document in documents if document.name in names]
    if not documents:
        raise DataError(f"--data: {given} holds no text; give files that are not empty")
    return [document.text for document in documents]


__all__ = ["documents_of", "evaluate", "judge"]
