"""Check of a run's corpus and tokenizer before Ray starts: a small corpus whole, a large one by samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from errors import DataError
from jobs.config.run_config import RunConfig
from jobs.data.documents import held_out, read_documents
from jobs.data.file_formats import is_streamed
from jobs.data.source_files import SourceFile, find_files
from jobs.data.tokenizer import load_tokenizer, tokenizer_files

_BYTES = 16 << 20  # A corpus up to this size, decompressed too, is read whole.
_FILES = 64


def check_corpus(config: RunConfig, *, tokenizer: Path | None = None) -> None:
    """Check a run's corpus and tokenizer: a small corpus whole, else the first document of some files.

    Args:
        tokenizer: The tokenizer that is used in place of `data.tokenizer`.

    Raises:
        DataError: The corpus is missing, holds too few documents, or a record cannot be read and
            `data.on_bad_record` does not skip it.
        ConfigError: The tokenizer does not fit the model.
    """
    chosen = tokenizer or (Path(config.data.tokenizer).expanduser() if config.data.tokenizer else None)
    if chosen is not None:
        tokenizer_files(chosen, load_tokenizer(chosen, config.model.vocab_size))
    files = find_files(config.data.path)
    if config.data.path is None:  # Python's own source
        return
    sizes = [_size(file) for file in files]
    whole = len(files) <= _FILES and sum(sizes) <= _BYTES
    skipped: list[str] = []
    skip = skipped.append if config.data.on_bad_record == "skip" else None
    read: dict[str, int] = {}
    total = 0
    for file in files if whole else _some(files, sizes):
        found = read_documents(file, config.data.text_field, skipped=skip)
        for document in found if whole else islice(found, 1):
            read[document.name] = len(document.text.encode())
            total += read[document.name]
            if total > _BYTES:  # of compressed files that are small
                return
    if whole:
        check_skipped(len(read), len(skipped), skipped)
        held = held_out(list(read), config.data.validation_fraction, path=config.data.path)
        if chosen is None:
            _check_size([size for name, size in read.items() if name not in held], config)


def _check_size(sizes: Sequence[int], config: RunConfig) -> None:
    """Refuse documents of these sizes, in bytes, where one token for each byte fills no row."""
    tokens = sum(sizes) + len(sizes)  # one more ends each document
    length = config.training.sequence_length
    if tokens < length + 1 + config.model.num_nextn_predict_layers:
        raise DataError(
            f"data.path: the {sum(sizes)} bytes to train on fill no row of training.sequence_length "
            f"({length}); give more text, or shorten the rows"
        )


def check_skipped(documents: int, n_skipped: int, examples: Sequence[str]) -> None:
    """Refuse a corpus of which nothing is left.

    Args:
        examples: Why records were skipped, some of `n_skipped`.

    Raises:
        DataError: No record could be read.
    """
    if n_skipped and not documents:
        raise DataError(f"{examples[0]} (data.on_bad_record skipped all {n_skipped} records like this)")


def _some(files: Sequence[SourceFile], sizes: Sequence[int]) -> list[SourceFile]:
    """Files from all over the corpus of which the first document is read quickly."""
    quick = [
        file
        for file, size in zip(files, sizes, strict=True)
        if is_streamed(file.name) or size <= _BYTES // _FILES
    ]
    return quick[:: -(-len(quick) // _FILES)] if quick else []


def _size(file: SourceFile) -> int:
    try:
        return os.stat(file.path).st_size
    except OSError:  # reading it says why
        return 0


__all__ = ["check_corpus", "check_skipped"]
