"""Corpora of strangers: no files, and small ones that hold gigabytes, end in one line and bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from errors import DataError
from jobs.data import bounded_reading
from jobs.data.bounded_reading import most_expanded
from jobs.data.documents import read_documents
from jobs.data.source_files import SourceFile, find_files
from support.hostile_files import NO_FILES

_MIB, _PIECE = 1 << 20, 64 << 10


def documents(path: Path) -> Iterator[str]:
    for document in read_documents(SourceFile(path=str(path), name=path.name), "text"):
        yield document.text


@contextmanager
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Smaller limits, so that what exceeds them is made quickly."""
    monkeypatch.setattr(bounded_reading, "LARGEST_TEXT", 16 * _MIB)
    monkeypatch.setattr(bounded_reading, "_FREE_EXPANSION", 64 << 10)
    monkeypatch.setattr(bounded_reading, "MOST_VALUES", 30_000)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("suffix", [".txt", ".py", ".json", ".jsonl", ".txt.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind != "file that grows"])
def test_what_has_taken_the_place_of_a_file_is_not_opened(tmp_path: Path, kind: str, suffix: str) -> None:
    """After the folder was read, since folders give regular files alone."""
    make, said = NO_FILES[kind]
    path = tmp_path / f"a{suffix}"
    make(path)
    with pytest.raises(DataError, match=f"{path} cannot be read: .*{said}"):
        list(documents(path))


def test_a_folder_gives_regular_files_alone(tmp_path: Path) -> None:
    for number, (make, _) in enumerate(NO_FILES.values()):
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number) / "a.txt")
    (tmp_path / "b.txt").write_text("b")
    found = [file.name for file in find_files(str(tmp_path))]
    assert "b.txt" in found
    assert all(os.path.isfile(tmp_path / name) for name in found)


def test_a_pipe_as_the_corpus_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"data\.path: .* is neither a file nor a folder"):
        find_files(str(tmp_path / "a.jsonl"))


def gzip_bomb(text: bytes, repeated: bytes, times: int) -> bytes:
    """A gzip file of a text that is repeated without end, which is never whole in memory."""
    packer = zlib.compressobj(level=9, wbits=31)
    parts = [packer.compress(text)]
    parts += [packer.compress(repeated) for _ in range(times)]
    return b"".join([*parts, packer.flush()])


def zstd_bomb(text: bytes, repeated: bytes, times: int) -> bytes:
    frames: list[bytes] = [pyarrow.Codec("zstd").compress(part, asbytes=True) for part in (text, repeated)]
    return frames[0] + frames[1] * times


LINE = json.dumps({"text": "a" * 1000}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "text", "repeated"),
    [
        ("a.txt", b"", bytes(_PIECE)),  # one text
        ("a.json", b"[", b"[]," * (_PIECE // 3)),
        ("a.jsonl", b'{"text": "', b"a" * _PIECE),  # one line
        ("a.jsonl", LINE, LINE * (_PIECE // len(LINE))),  # many lines
    ],
)
@pytest.mark.parametrize("pack", [gzip_bomb, zstd_bomb])
def test_a_compressed_file_that_holds_far_more_than_text_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: bytes,
    repeated: bytes,
    pack: Callable[[bytes, bytes, int], bytes],
) -> None:
    content = pack(text, repeated, 100)
    path = tmp_path / f"{name}{'.gz' if pack is gzip_bomb else '.zst'}"
    path.write_bytes(content)
    read = 0
    with small(monkeypatch):
        most = most_expanded(len(content))
        assert most < 95 * _PIECE
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=r"decompresses to more than .* decompress it") as caught:
                for document in documents(path):
                    read += len(document)
            assert tracemalloc.get_traced_memory()[1] < 4 * most + 4 * _MIB
        finally:
            tracemalloc.stop()
    assert read <= most
    assert f"has {len(content):,} bytes" in str(caught.value)


def test_a_compressed_file_of_ordinary_repetition_is_read(tmp_path: Path) -> None:
    log = "".join(
        f"2026-01-01 00:{i // 60 % 60:02}:{i % 60:02} GET /v1/models 200 {i}\n" for i in range(20_000)
    )
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(log.encode()))
    assert list(documents(tmp_path / "a.txt.gz")) == [log]


def parquet(path: Path, column: pyarrow.Array) -> int:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd", store_schema=False)
    return path.stat().st_size


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.binary()])
def test_a_text_that_a_parquet_file_holds_once_for_many_rows(tmp_path: Path, kind: pyarrow.DataType) -> None:
    """100,000 rows of 8 MiB in less than a thousand bytes: 781 GiB."""
    text = pyarrow.array([b"\xff" * (8 * _MIB)] if kind == pyarrow.binary() else ["a" * (8 * _MIB)], kind)
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), text)
    size = parquet(tmp_path / "a.parquet", rows)
    assert size < 1000
    before = pyarrow.total_allocated_bytes()
    problems: list[str] = []
    read = 0
    file = SourceFile(path=str(tmp_path / "a.parquet"), name="a.parquet")
    for document in read_documents(file, "text", skipped=problems.append):
        read += len(document.text)
        assert pyarrow.total_allocated_bytes() - before < 200 * _MIB
    assert read <= most_expanded(size)
    assert "decompresses to more than" in problems[-1]


def test_a_parquet_file_whose_pages_expand_is_refused_by_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = pyarrow.array([f"{i:04}" + "a" * (20 << 10) for i in range(200)])
    size = parquet(tmp_path / "a.parquet", texts)
    with small(monkeypatch):
        assert most_expanded(size) < 3900 << 10
    with small(monkeypatch), pytest.raises(DataError, match="decompresses to more than"):
        next(documents(tmp_path / "a.parquet"))


def test_rows_of_equal_texts_are_read_from_parquet(tmp_path: Path) -> None:
    texts = ["one", "two", "one", None, "three"] * 500
    parquet(tmp_path / "a.parquet", pyarrow.array([text or "" for text in texts]))
    assert list(documents(tmp_path / "a.parquet")) == [text for text in texts if text]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pyarrow.array([["a"]]), "has no text in the column 'text', which is list"),
        (pyarrow.array([{"a": "b"}]), "has no text in the column 'text', which is struct"),
        (pyarrow.array([b"ab"], pyarrow.binary(2)), "has no text in the column 'text', which is fixed_size"),
        (pyarrow.array([7]), "row 1: has no text in the field 'text', which is a number"),
    ],
)
def test_a_column_that_cannot_hold_text_is_named(tmp_path: Path, column: pyarrow.Array, said: str) -> None:
    parquet(tmp_path / "a.parquet", column)
    with pytest.raises(DataError, match=said):
        list(documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "begins", "said"),
    [
        ("a.txt", b"", "holds more than 16,777,216 bytes and is read whole; split it, or write JSON lines"),
        ("a.py", b"", "holds more than 16,777,216 bytes"),
        ("a.json", b"[", "holds more than 16,777,216 bytes"),
        ("a.jsonl", LINE, "has more than 16,777,216 bytes in line 2; split it"),
    ],
)
def test_a_sparse_file_takes_no_more_memory_than_the_largest_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begins: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(begins)
    os.truncate(tmp_path / name, 10 << 30)
    tracemalloc.start()
    try:
        with small(monkeypatch), pytest.raises(DataError, match=said):
            list(documents(tmp_path / name))
        assert tracemalloc.get_traced_memory()[1] < 64 * _MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.json", "is JSON of more than 30,000 values; split it"),
        ("a.jsonl", "line 1: JSON of more than 30,000 values; split or remove it"),
    ],
)
def test_json_of_more_values_than_there_is_memory_for_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    (tmp_path / name).write_bytes(b"[" + b"[]," * 32_000 + b"[]]")
    with small(monkeypatch), pytest.raises(DataError, match=said):
        list(documents(tmp_path / name))
