"""Prepares the corpus of a run with Ray Data: reads, holds out, tokenizes and packs documents.

The rows lie in Ray's object store. Their order follows that of the files, and names decide which documents
are held out, so the same corpus gives the same rows on any cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import ray
import ray.data
from tokenizers import Tokenizer

from errors import DataError
from jobs.config.run_config import RunConfig
from jobs.console import counted, own_error
from jobs.data.carried_files import TOKENIZER_FILE, CarriedFiles
from jobs.data.corpus_check import check_skipped
from jobs.data.documents import Document, held_out, name_hash, read_documents
from jobs.data.held_out import HeldOut, zlib_bits_per_byte
from jobs.data.packing import PackedCorpus, Packer, TokenBlock
from jobs.data.source_files import SourceFile, find_files
from jobs.data.tokenizer import (
    document_tokenizer,
    encode_documents,
    load_tokenizer,
    opening_length,
    tokenizer_files,
    train_tokenizer,
    trained_files,
)
from model.checkpoints.guarded_files import is_there

_SAMPLE_BYTES = 16 << 20  # of training text that a tokenizer is trained on
_CHUNK_BYTES = 8 << 20  # of text that one block of a dataset holds, about
_EXAMPLES = 3  # skipped records that are named
_RAYS_ADVICE = "\nFailed to "  # Ray Data appends how it retried to the text of any error
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class InObjectStore(Generic[_T]):
    """A value in Ray's object store; its numpy arrays are read as views of shared memory."""

    reference: ray.ObjectRef

    def get(self) -> _T:
        """The value, fetched if it is on another node."""
        value: _T = ray.get(self.reference)
        return value


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The prepared documents of a run.

    Attributes:
        tokenizer: Text of the tokenizer.json.
        end_of_text: Id of the token after each document.
        train: Rows to train on.
        train_documents: Number of documents in these rows.
        held_out: Rows to evaluate on.
        carried: Files that every checkpoint of the run gets beside its weights.
        skipped: Number of records that could not be read and were left out.
    """

    tokenizer: str
    end_of_text: int
    train: PackedCorpus
    train_documents: int
    held_out: HeldOut
    carried: CarriedFiles = field(default_factory=CarriedFiles)
    skipped: int = 0

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer and what is carried with it into a folder; ids go into its config.json."""
        self.carried.write(directory)

    def carrying(self, weights: Path) -> PreparedData:
        """The same data for a run that starts from weights, whose other files its checkpoints then have."""
        theirs = CarriedFiles.of_model(weights)
        if not is_there(weights / TOKENIZER_FILE):
            # The tokenizer is that of data.tokenizer, and files beside these weights name other tokens.
            carried = CarriedFiles(files=self.carried.files, config={**theirs.config, **self.carried.config})
            return replace(self, carried=carried)
        return replace(self, carried=theirs.over(self.carried))


def prepare(
    config: RunConfig, *, tokenizer: Path | None = None, note: Callable[[str], None] | None = None
) -> PreparedData:
    """Read, split, tokenize and pack the corpus of a run. Ray must be initialized.

    Args:
        config: The run's configuration.
        tokenizer: A tokenizer to use in place of `data.tokenizer`: that of the checkpoint which the run
            resumes or starts from.
        note: Called with a description before each part that takes long.

    Raises:
        DataError: The corpus is missing, unreadable, or too small.
        ConfigError: The tokenizer does not fit the model.
    """
    note = note or (lambda _: None)
    chosen = tokenizer or (Path(config.data.tokenizer).expanduser() if config.data.tokenizer else None)
    vocab_size = config.model.vocab_size
    loaded = load_tokenizer(chosen, vocab_size) if chosen else None
    files = find_files(config.data.path)
    note(f"reading {counted(len(files), 'file')}")
    documents = _read(files, config.data.text_field, skip=config.data.on_bad_record == "skip")
    sizes, skipped = _sizes(documents, note)
    held = held_out(list(sizes), config.data.validation_fraction, path=config.data.path)
    training, validation = _only(documents, held, keep=False), _only(documents, held, keep=True)
    if loaded is None or chosen is None:
        note(f"training the tokenizer: {vocab_size:,} tokens")
        model, end_of_text = train_tokenizer(_sample(training, sizes, held), vocab_size)
        carried = trained_files(model, end_of_text)
    else:
        model, end_of_text = loaded.tokenizer, loaded.end_of_text
        carried = tokenizer_files(chosen, loaded)
    text = model.to_str()

    note(f"packing {counted(len(sizes), 'document')}")
    train, packer = _pack(training, text, end_of_text, config, pad=False)
    if train.n_rows == 0:
        raise DataError(
            f"data.path: the {packer.n_tokens} tokens to train on fill no row of training.sequence_length "
            f"({config.training.sequence_length}); give more text, or shorten the rows"
        )
    evaluation, _ = _pack(validation, text, end_of_text, config, pad=True)
    return PreparedData(
        tokenizer=text,
        end_of_text=end_of_text,
        train=train,
        train_documents=packer.n_documents,
        held_out=HeldOut(
            rows=evaluation,
            documents=len(held),
            size=sum(sizes[name] for name in held),
            zlib_bits_per_byte=zlib_bits_per_byte(row["text"] for row in _take(validation)),
            begun=opening_length(model) > 0,
        ),
        carried=carried,
        skipped=skipped,
    )


def _read(files: Sequence[SourceFile], text_field: str, *, skip: bool) -> ray.data.Dataset:
    """A dataset of (name, text, size, problem) in the order of the files, in the object store.

    `problem` is null but for records that could not be read and are skipped, which have no text.
    """

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        held: list[Document] = []
        problems: list[str] = []
        skipped = problems.append if skip else None
        size = 0
        for index in batch["item"]:
            for document in read_documents(files[int(index)], text_field, skipped=skipped):
                held.append(document)
                size += len(document.text)
                if size >= _CHUNK_BYTES:
                    yield _table(held)
                    held, size = [], 0
        yield _table(held)
        yield _skipped_table(problems)

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Ray Data prints the error of a task and also raises it; its own output is shown with --debug only.
    debug = logging.getLogger("ray").getEffectiveLevel() <= logging.INFO
    logging.getLogger("ray.data").setLevel(logging.WARNING if debug else logging.CRITICAL)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that bars are off
    items = ray.data.from_items(list(range(len(files))), override_num_blocks=min(len(files), 8))
    with _own_errors():
        return items.map_batches(read, batch_size=None).materialize()


def _sizes(documents: ray.data.Dataset, note: Callable[[str], None]) -> tuple[dict[str, int], int]:
    """Bytes of each document by name, and the number of skipped records, which are noted.

    Raises:
        DataError: All records were skipped.
    """
    sizes: dict[str, int] = {}
    examples: list[str] = []
    n_skipped = 0
    for row in _take(documents.select_columns(["name", "size", "problem"])):
        if row["problem"] is None:
            sizes[row["name"]] = row["size"]
        else:
            n_skipped += 1
            if len(examples) < _EXAMPLES:
                examples.append(row["problem"])
    check_skipped(len(sizes), n_skipped, examples)
    if n_skipped:
        there = counted(len(sizes), "document")
        note(f"skipped {counted(n_skipped, 'record')} that cannot be read, beside {there}")
        for example in examples:
            note(f"skipped: {example}")
    return sizes, n_skipped


def _only(documents: ray.data.Dataset, names: set[str], *, keep: bool) -> ray.data.Dataset:
    """The documents with these names, or all others."""
    wanted = pa.array(sorted(names), pa.string())

    def choose(batch: pa.Table) -> pa.Table:
        batch = batch.filter(pyarrow.compute.is_null(batch.column("problem")))
        named = pyarrow.compute.is_in(batch.column("name"), value_set=wanted)
        return batch.filter(named if keep else pyarrow.compute.invert(named))

    return documents.map_batches(choose, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)


def _table(documents: Sequence[Document]) -> pa.Table:
    return pa.table(
        {
            "name": pa.array([document.name for document in documents], pa.string()),
            "text": pa.array([document.text for document in documents], pa.large_string()),
            "size": pa.array([len(document.text.encode()) for document in documents], pa.int64()),
            "problem": pa.nulls(len(documents), pa.string()),
        }
    )


def _skipped_table(problems: Sequence[str]) -> pa.Table:
    empty = [""] * len(problems)
    return pa.table(
        {
            "name": pa.array(empty, pa.string()),
            "text": pa.array(empty, pa.large_string()),
            "size": pa.array([0] * len(problems), pa.int64()),
            "problem": pa.array(problems, pa.string()),
        }
    )


def _sample(training: ray.data.Dataset, sizes: dict[str, int], held: set[str]) -> Iterator[str]:
    """Training documents from all over the corpus, about `_SAMPLE_BYTES` in all."""
    chosen: set[str] = set()
    size = 0
    for name in sorted(sizes.keys() - held, key=lambda name: (name_hash(f"sample {name}"), name)):
        if chosen and size + sizes[name] > _SAMPLE_BYTES:
            break
        chosen.add(name)
        size += sizes[name]
    return (row["text"] for row in _take(training) if row["name"] in chosen)


def _pack(
    documents: ray.data.Dataset, tokenizer: str, end_of_text: int, config: RunConfig, *, pad: bool
) -> tuple[PackedCorpus, Packer]:
    """Tokenize and pack documents; each full block goes into the object store."""

    def encode(batch: pa.Table) -> pa.Table:
        texts = batch.column("text").to_pylist()
        encoded = encode_documents(_tokenizer(tokenizer), texts, end_of_text)
        return pa.table({"tokens": pa.array(encoded, pa.large_list(pa.int32()))})

    length, depth = config.training.sequence_length, config.model.num_nextn_predict_layers
    rows_per_block = max(1, (4 << 20) // length)
    packer = Packer(
        sequence_length=length, depth=depth, end_of_text=end_of_text, rows_per_block=rows_per_block
    )
    encoded = documents.map_batches(encode, batch_format="pyarrow", batch_size=256, zero_copy_batch=True)

    stored: list[InObjectStore[TokenBlock]] = []
    counts = [np.zeros(0, dtype=np.int32)]

    def keep(blocks: Iterator[TokenBlock]) -> None:
        for block in blocks:
            counts.append(block.targets_per_row(length, depth))
            stored.append(InObjectStore(ray.put(block)))

    with _own_errors():
        for batch in encoded.iter_batches(batch_format="pyarrow", batch_size=None):
            for tokens in batch.column("tokens"):
                keep(packer.add(tokens.values.to_numpy()))
    keep(packer.finish(pad=pad))
    targets = np.concatenate(counts)
    corpus = PackedCorpus(
        stored,
        InObjectStore(ray.put(targets)),
        n_rows=len(targets),
        rows_per_block=rows_per_block,
        sequence_length=length,
        depth=depth,
    )
    return corpus, packer


@lru_cache(maxsize=1)
def _tokenizer(text: str) -> Tokenizer:
    return document_tokenizer(text)


def _take(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    with _own_errors():
        yield from dataset.iter_rows()


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise a `RaymoeError` of a task as itself, without the exceptions that Ray wraps around it."""
    try:
        yield
    except Exception as error:
        own = own_error(error)
        if own is None or own is error:
            raise
        raise type(own)(str(own).partition(_RAYS_ADVICE)[0]) from None


__all__ = ["InObjectStore", "PreparedData", "prepare"]
