"""Corpora through Ray Data: every kind of file, the same rows every time, errors that name the mistake."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
from tokenizers import Tokenizer

from errors import ConfigError, DataError
from jobs.config.config_file import load_config
from jobs.config.run_config import RunConfig
from jobs.data.carried_files import CarriedFiles
from jobs.data.corpus import PreparedData, prepare
from jobs.data.documents import held_out, read_documents
from jobs.data.source_files import find_files
from model.checkpoints.pretrained import write_model_config
from support.foreign_model import END, MODEL, save_foreign_model

TEXTS = [f"Document number {i} says " + " ".join(f"word{j % (i + 3)}" for j in range(60)) for i in range(30)]
# Ray's own code warns of its own settings.
pytestmark = [
    pytest.mark.shares("ray"),
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def _config(path: Path | str, *more: str) -> RunConfig:
    return load_config(preset_name="tiny", overrides=[f"data.path={json.dumps(str(path))}", *more])


def _folder(directory: Path) -> Path:
    for i, text in enumerate(TEXTS):
        file = directory / f"part{i % 3}" / f"{i:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory


def _rows(data: PreparedData) -> list[list[int]]:
    return [data.train.row(i)[0].tolist() for i in range(data.train.n_rows)]


def _text(data: PreparedData) -> str:
    """All training tokens, decoded."""
    tokens = [token for row in _rows(data) for token in row[: data.train.sequence_length]]
    text: str = Tokenizer.from_str(data.tokenizer).decode(tokens, skip_special_tokens=False)
    return text


def test_a_folder_becomes_rows_of_its_documents_in_order(tmp_path: Path) -> None:
    data = prepare(_config(_folder(tmp_path), "data.validation_fraction=0.1"))
    assert data.train_documents + data.held_out.documents == len(TEXTS)
    names = [file.name for file in find_files(str(tmp_path))]
    assert names == sorted(names)
    held = held_out(names, 0.1)
    kept = [(tmp_path / name).read_text() for name in names if name not in held]
    stream = "".join(text + "<|endoftext|>" for text in kept)
    text = _text(data)
    assert len(text) > 0.95 * len(stream)  # the last tokens fill no row
    assert stream.startswith(text)
    assert data.held_out.size == sum((tmp_path / name).stat().st_size for name in held)
    assert data.train.sequence_length == 32
    assert data.train.row(0)[0].shape == (34,)


def test_the_same_corpus_gives_the_same_rows_and_tokenizer_wherever_it_lies(tmp_path: Path) -> None:
    first = prepare(_config(_folder(tmp_path / "here")))
    second = prepare(_config(_folder(tmp_path / "there" / "deeper")))
    assert first.tokenizer == second.tokenizer
    assert _rows(first) == _rows(second)
    assert first.held_out.zlib_bits_per_byte == second.held_out.zlib_bits_per_byte


@pytest.mark.parametrize("kind", ["glob", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_file_holds_the_same_documents(tmp_path: Path, kind: str) -> None:
    lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in TEXTS)
    path = tmp_path / f"corpus.{kind}"
    if kind == "glob":
        path = _folder(tmp_path) / "**" / "*.txt"
    elif kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1] * len(TEXTS)}), path)
    data = prepare(_config(path, "data.text_field=body"))
    assert data.train_documents + data.held_out.documents == len(TEXTS)
    parts = _text(data).split("<|endoftext|>")
    assert set(parts[:-1]) < set(TEXTS)
    assert len(parts) - 1 >= data.train_documents - 1


def test_one_text_file_is_cut_into_documents_at_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS))
    pieces = [document.text for document in read_documents(find_files(str(file))[0], "text")]
    assert "".join(pieces) == file.read_text()
    assert all(piece.endswith("\n") for piece in pieces)
    data = prepare(_config(file))
    assert data.held_out.documents >= 1
    assert data.train_documents + data.held_out.documents == len(pieces) > 10


def test_rows_travel_to_a_worker_as_references(tmp_path: Path) -> None:
    data = prepare(_config(_folder(tmp_path)))
    assert len(pickle.dumps(data.train.n_rows)) < 100

    @ray.remote
    def read(corpus: Any) -> tuple[Any, bool, int]:
        tokens, _ = corpus.row(1)
        return tokens, tokens.flags.writeable, corpus.count_targets(range(corpus.n_rows))

    tokens, writeable, targets = ray.get(read.remote(data.train))
    assert np.array_equal(tokens, data.train.row(1)[0])
    assert not writeable  # a view of the object store, no copy
    assert targets == data.train.count_targets(range(data.train.n_rows))


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    first = prepare(_config(_folder(tmp_path / "corpus")))
    first.save_tokenizer(tmp_path / "tokenizer")
    other = tmp_path / "other"
    other.mkdir()
    for i in range(9):
        (other / f"{i}.txt").write_text(f"quite another text, number {i}, " * 9)
    config = _config(other, f"data.tokenizer={json.dumps(str(tmp_path / 'tokenizer'))}")
    assert prepare(config).tokenizer == first.tokenizer
    assert prepare(_config(other), tokenizer=tmp_path / "tokenizer").tokenizer == first.tokenizer


@pytest.mark.parametrize(
    ("files", "path", "error", "said"),
    [
        ({}, "none.txt", DataError, r"data\.path: .*none\.txt does not exist"),
        ({}, "", DataError, r"data\.path: .* holds no files"),
        ({}, "*.txt", DataError, "does not exist"),
        ({"a.txt": b""}, "", DataError, r"data\.path: .* holds 0 documents with text"),
        ({"a.txt": b"x" * 900}, "", DataError, "at least two are needed"),
        ({"a.txt": b"few", "b.txt": b"words"}, "", DataError, r"fill no row of training\.sequence_length"),
        ({"a.txt": b"text", "b.bin": b"\xff\xfe\xff"}, "", DataError, r"b\.bin is not UTF-8"),
        ({"a.jsonl": b'{"text": "x"}\nnot json\n'}, "a.jsonl", DataError, r"a\.jsonl, line 2: not JSON"),
        ({"a.jsonl": b'{"body": "x"}\n'}, "a.jsonl", DataError, r"line 1: .*'text'; set data\.text_field"),
        ({"a.parquet": b"PAR"}, "a.parquet", DataError, r"a\.parquet is not a Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, files: dict[str, bytes], path: str, error: type[Exception], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=said) as caught:
        prepare(_config(tmp_path / path))
    assert "Traceback" not in str(caught.value)


def test_what_takes_time_is_announced(tmp_path: Path) -> None:
    notes: list[str] = []
    data = prepare(_config(_folder(tmp_path / "corpus")), note=notes.append)
    assert notes == ["reading 30 files", "training the tokenizer: 512 tokens", "packing 30 documents"]
    data.save_tokenizer(tmp_path)
    notes.clear()
    prepare(_config(tmp_path / "corpus"), tokenizer=tmp_path, note=notes.append)
    assert notes == ["reading 30 files", "packing 30 documents"]


def test_records_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    good = "".join(f"{line}\n" for line in lines)
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "read"}\n' * 9)[:-8])
    (tmp_path / "some.jsonl").write_text("not json\n" + good.replace("Document", "Another") + '{"n": 1}\n')
    notes: list[str] = []
    data = prepare(_config(tmp_path, "data.on_bad_record=skip"), note=notes.append)
    assert data.skipped == 3
    assert data.train_documents + data.held_out.documents == 9 + 2 * len(TEXTS)
    assert "skipped 3 records that cannot be read, beside 69 documents" in notes
    named = [note for note in notes if note.startswith("skipped: data.path: ")]
    assert [Path(note.split()[2].rstrip(",")).name for note in named] == [
        "cut.jsonl.gz",
        "some.jsonl",
        "some.jsonl",
    ]
    parts = set(_text(data).split("<|endoftext|>")[:-1])
    assert parts <= {"read", *TEXTS, *(text.replace("Document", "Another") for text in TEXTS)}
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz is cut short or damaged after line 9"):
        prepare(_config(tmp_path))


def test_ray_says_nothing_beside_the_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff" * 5000)
    level = logging.getLogger("ray").level
    logging.getLogger("ray").setLevel(logging.ERROR)  # as without --debug
    try:
        with pytest.raises(DataError):
            prepare(_config(tmp_path / "a.txt"))
    finally:
        logging.getLogger("ray").setLevel(level)
    assert capfd.readouterr().err == ""


def test_documents_begin_as_the_tokenizer_says_and_what_it_came_with_is_carried(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    foreign = save_foreign_model(tmp_path / "foreign")
    texts = ["def the cat</s> sat", "<s>the self<|im_end|>"] * 20
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepare(
        _config(tmp_path / "corpus.jsonl", "data.validation_fraction=0.1"),
        tokenizer=foreign / "tokenizer.json",
    )
    theirs = AutoTokenizer.from_pretrained(foreign)
    expected = {tuple(theirs(text, split_special_tokens=True)["input_ids"]) for text in texts}
    stream = [token for row in _rows(data) for token in row[: data.train.sequence_length]]
    found, at = set(), 0
    while END in stream[at:]:
        end = stream.index(END, at)
        found.add(tuple(stream[at:end]))
        at = end + 1
    assert found == expected
    assert data.held_out.begun

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_model_config(checkpoint, MODEL)
    data.carrying(foreign).save_tokenizer(checkpoint)
    given = CarriedFiles.of_model(foreign)
    written = CarriedFiles.of_model(checkpoint)
    assert written.files == given.files
    assert {name: written.config[name] for name in given.config} == given.config


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    prepare(_config(_folder(tmp_path / "corpus"))).save_tokenizer(tmp_path)
    config = _config(
        tmp_path / "corpus", f"data.tokenizer={json.dumps(str(tmp_path))}", "model.vocab_size=300"
    )
    with pytest.raises(ConfigError, match=r"model\.vocab_size \(300\) is smaller than"):
        prepare(config)


def test_held_out_documents_depend_on_their_names_alone() -> None:
    names = [f"{i}.py" for i in range(500)]
    held = held_out(names, 0.1)
    assert 25 < len(held) < 75
    assert held_out(names[::-1], 0.1) == held
    assert held_out(names[:250], 0.1) == held & set(names[:250])
    assert len(held_out(["a", "b"], 1e-9)) == 1
    assert len(held_out(["a", "b"], 1 - 1e-9)) == 1


def test_the_standard_library_is_a_corpus_without_its_tests() -> None:
    names = [file.name for file in find_files(None)]
    assert names == sorted(names)
    assert {"ast.py", "asyncio/base_events.py", "json/decoder.py"} <= set(names)
    assert not {"test", "tests", "idlelib", "site-packages"} & {
        part for name in names for part in name.split("/")
    }
    assert len(names) > 300
