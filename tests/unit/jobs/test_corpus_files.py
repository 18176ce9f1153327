"""Reading a corpus without Ray: which files belong to it, their formats, and records that cannot be read."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from errors import ConfigError, DataError, RaymoeError
from jobs.config.config_file import load_config
from jobs.data import corpus_check
from jobs.data.corpus_check import check_corpus
from jobs.data.documents import read_documents
from jobs.data.source_files import find_files

GOOD = [{"text": "one"}, {"text": "two"}]
LINES = "".join(json.dumps(record) + "\n" for record in GOOD).encode()


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


def parquet(column: pyarrow.Array, name: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: column, "n": range(len(column))}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def texts_of(path: Path) -> list[str]:
    return [one.text for file in find_files(str(path)) for one in read_documents(file, "text")]


# Without the time, since names of tests are made of it, which have to be the same in every process.
GZIPPED = gzip.compress(LINES, mtime=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.NdJson.GZ", GZIPPED),
        ("a.jsonl.zst", zstd(LINES[:20]) + zstd(LINES[20:])),  # a file of two frames, as by zstd --append
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.json", json.dumps(GOOD, indent=1).encode()),
        ("a.json.gz", GZIPPED),
        ("a.JSON", b"\xef\xbb\xbf" + json.dumps(GOOD).encode()),
        ("a.Parquet", parquet(pyarrow.array(["one", "two"]))),
        ("a.jsonl", LINES.replace(b"{", b'{"n": 7, "inner": [[1]], ')),
    ],
)
def test_formats_are_told_by_suffixes_in_any_case(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts_of(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstd])
def test_a_compressed_text_is_the_text(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    suffix = {gzip.compress: ".gz", zstd: ".ZST"}.get(pack, "")  # type: ignore[call-overload]
    words = "".join(f"Zeile {i}: äöü\n" for i in range(200))
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(words.encode()))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(b"\xef\xbb\xbfb"))
    assert texts_of(tmp_path) == [words, "b"]
    pieces = texts_of(tmp_path / f"a.txt{suffix}")
    assert len(pieces) > 1
    assert "".join(pieces) == words


CUT = gzip.compress(LINES * 50)
PARQUET = parquet(pyarrow.array([f"text number {i}" for i in range(5000)]))
BAD: dict[str, tuple[str, bytes, str]] = {
    "cut gzip": ("a.jsonl.gz", CUT[:-9], r"is cut short or damaged after line \d+"),
    "damaged gzip": ("a.jsonl.gz", CUT[:10] + b"\xff" * 8 + CUT[18:], "is cut short or damaged"),
    "no gzip": ("a.txt.gz", b"plain text", "is cut short or damaged"),
    "cut zstd": ("a.jsonl.zst", zstd(LINES * 50)[:-3], "is cut short or damaged"),
    "no zstd": ("a.txt.zst", b"plain text", "is cut short or damaged"),
    "half surrogate": ("a.jsonl", LINES + b'{"text": "x\\ud83d"}\n', r"line 3: holds half of a .*\\ud83d"),
    "half surrogate in json": (
        "a.json",
        b'[{"text": "\\udc00"}]',
        "record 1: holds half of a surrogate pair",
    ),
    "huge integer": ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "line 1: .*more than 4,300"),
    "huge integer in json": ("a.json", b"[" + b"9" * 5000 + b"]", "more than 4,300 digits"),
    "deep nesting": ("a.jsonl", LINES + b"[" * 200_000 + b"\n", "line 3: .*nested too deeply"),
    "deep nesting in json": ("a.json", b"[" * 200_000, "nested too deeply"),
    "no object": ("a.jsonl", LINES + b'["text"]\n', "line 3: is a list, not an object"),
    "no json": ("a.json", b'{"text": "x",}', r"is not JSON \(line 1: "),
    "not utf-8": ("a.jsonl", LINES + '{"text": "ä"}\n'.encode("latin-1"), r"line 3: is not UTF-8"),
    "utf-16": ("a.txt", "text".encode("utf-16"), "is not UTF-8 text .*iconv -f UTF-16 -t UTF-8"),
    "python": ("a.py", b"# coding: nonesuch\n", "is not Python source"),
    "python of no text": (
        "a.py",
        b"# coding: hex\nx = 1\n",
        "is not Python source .*'hex' is not a text encoding",
    ),
    "python without encoding": ("a.py", b"# coding: undefined\nx = 1\n", "is not Python source .*undefined"),
    "python of its encoding": ("a.py", b"# coding: ascii\nx = '\xe4'\n", r"is not UTF-8 text \(byte"),
    "half surrogate in python": ("a.py", b"# coding: utf-7\nx = '+2AA-'\n", r"holds half of a .*\\ud800 at"),
    "null": ("a.jsonl", b'{"text": null}\n', "line 1: has no text in the field 'text', which is null"),
    "no field": (
        "a.jsonl",
        b'{"body": "x", "title": "y", "n": 1}\n',
        r"line 1: has no text in the field 'text'; set data\.text_field to one of body, title$",
    ),
    "no column": (
        "a.parquet",
        parquet(pyarrow.array(["one"]), "body"),
        r"has no column 'text'; set data\.text_field to one of body, n$",
    ),
    "no parquet": ("a.parquet", b"PAR", "is not a Parquet file"),
    "damaged parquet": ("a.parquet", PARQUET[:50] + bytes(200) + PARQUET[250:], "is cut short or damaged"),
    "not utf-8 in parquet": (
        "a.parquet",
        parquet(pyarrow.array([b"one", b"\xff"]).cast(pyarrow.string(), safe=False)),
        "row 2: is not UTF-8",
    ),
    "compressed parquet": ("a.parquet.gz", gzip.compress(b"PAR"), "is a compressed Parquet file"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_cannot_be_read_is_one_line_or_skipped(tmp_path: Path, case: str) -> None:
    name, content, said = BAD[case]
    (tmp_path / name).write_bytes(content)
    (file,) = find_files(str(tmp_path))
    with pytest.raises(DataError, match=said) as caught:
        list(read_documents(file, "text"))
    line = str(caught.value)
    assert line.startswith(f"data.path: {tmp_path / name}")
    assert "\n" not in line
    assert caught.value.exit_code == 2
    assert "*" not in line  # a glob as advice would match the file itself
    skipped: list[str] = []
    kept = [one.text for one in read_documents(file, "text", skipped=skipped.append)]
    assert skipped == [line]
    if content.startswith(LINES):
        assert kept == ["one", "two"]
    # Found before Ray starts, as an error or because nothing is left.
    overrides = [f"data.path={json.dumps(str(tmp_path))}"]
    with pytest.raises(RaymoeError, match=said):
        check_corpus(load_config(preset_name="tiny", overrides=overrides))


def test_good_records_around_a_bad_one_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b"bad\n" + LINES)
    (file,) = find_files(str(tmp_path))
    names = [one.name for one in read_documents(file, "text", skipped=lambda _: None)]
    assert names == ["a.jsonl#1", "a.jsonl#2", "a.jsonl#4", "a.jsonl#5"]


def test_folder_and_glob_find_the_same_files(tmp_path: Path) -> None:
    """Through links to folders too, each file once and without end, and without hidden names."""
    root, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for name in ("a.txt", "b/c.txt", "b/d/e.TXT", ".hidden/f.txt", "b/.g.txt", ".h.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    elsewhere.mkdir()
    (elsewhere / "i.txt").write_text("i")
    (root / "a-link").symlink_to(root / "b")  # sorts before b, whose own name it must not take
    (root / "far").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    (root / "b" / "loop").symlink_to(root)
    (root / "nothing").symlink_to(tmp_path / "missing")
    expected = ["a.txt", "b/c.txt", "b/d/e.TXT", "far/i.txt"]

    def names(path: Path) -> list[str]:
        return [file.name for file in find_files(str(path))]

    assert names(root) == expected
    assert names(root / "**") == names(root / "**" / "*") == expected
    assert names(root / "**" / "*.txt") == [name for name in expected if not name.endswith("TXT")]
    assert names(root / "**" / "*.[tT][xX][tT]") == expected
    assert names(root / "*.txt") == ["a.txt"]
    assert names(root / "*" / "*.txt") == ["b/c.txt", "far/i.txt"]
    assert names(root / "b" / "**" / "d" / "*") == ["d/e.TXT"]
    assert names(root / ".hid*" / "*") == [".hidden/f.txt"]
    assert names(root / "a-l*" / "*.txt") == names(root / "**" / "a-link" / "*.txt") == ["a-link/c.txt"]
    assert names(root / "b*" / "loop" / "**" / "a.txt") == ["b/loop/a.txt"]
    assert len(names(root / "**" / "loop" / "*.txt")) == 1  # of two names of one file
    assert [file.path for file in find_files(str(root / "f?r" / "*"))] == [str(root / "far" / "i.txt")]


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_text("text")
    (file,) = find_files(str(tmp_path))
    assert file.name == "caf\\xe9.txt"
    assert [one.name for one in read_documents(file, "text")] == ["caf\\xe9.txt"]


@pytest.mark.parametrize(
    ("files", "overrides", "said"),
    [
        ({}, [], r"data\.path: .* holds no files"),
        ({"a.txt": b"one"}, [], "holds 1 document"),
        ({"a.txt": b"", "b.txt": b""}, [], "holds 0 document"),
        ({"a.jsonl": b"x\ny\n"}, ["data.on_bad_record=skip"], r"line 1: .* skipped all 2 records"),
        ({"a.jsonl": LINES}, ["data.text_field=body"], r"data\.text_field to text$"),
        ({"a.jsonl": LINES}, ["data.tokenizer=/nonesuch"], r"data\.tokenizer: /nonesuch does not exist"),
        (
            {"a.txt": b"a" * 9, "b.txt": b"b" * 9},
            [],
            r"the 9 bytes to train on fill no row of training\.sequence_length \(32\)",
        ),
        ({"a.txt": b"a" * 40, "b.txt": b"b" * 40}, [], None),
        (
            {"a.jsonl": b"x\n" + LINES},
            ["data.on_bad_record=skip", "training.sequence_length=2", "training.batch_size=4"],
            None,
        ),
    ],
)
def test_a_corpus_is_checked_before_anything_starts(
    tmp_path: Path, files: dict[str, bytes], overrides: list[str], said: str | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    config = load_config(preset_name="tiny", overrides=[f"data.path={json.dumps(str(tmp_path))}", *overrides])
    if said is None:
        check_corpus(config)
        return
    with pytest.raises((DataError, ConfigError), match=said):
        check_corpus(config)


def test_of_a_large_corpus_the_beginning_is_checked(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i:03}.jsonl").write_bytes(LINES + b"found later\n")
    overrides = [f"data.path={json.dumps(str(tmp_path))}"]
    check_corpus(load_config(preset_name="tiny", overrides=overrides))
    with pytest.raises(DataError, match=r"000\.jsonl, line 1: has no text in the field 'body'"):
        check_corpus(load_config(preset_name="tiny", overrides=[*overrides, "data.text_field=body"]))


def test_a_small_file_of_much_text_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_check, "_BYTES", 2000)
    content = gzip.compress(LINES * 500 + b"found later\n")
    assert len(content) < 2000
    (tmp_path / "much.jsonl.gz").write_bytes(content)
    check_corpus(load_config(preset_name="tiny", overrides=[f"data.path={json.dumps(str(tmp_path))}"]))
