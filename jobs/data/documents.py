"""Reads documents from plain text, JSON lines and Parquet files; each document has a stable name."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from errors import DataError

_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_PARQUET = (".parquet",)
# Folders of the standard library with its tests or tables of data, and folders that are not part of it.
_NOT_SOURCE = frozenset(
    {
        "__pycache__",
        "encodings",
        "idlelib",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, and a name that does not depend on where the corpus is stored."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
        path: Path of the file.
        name: Path of the file within the corpus.
        piece_bytes: Size of the documents into which the text is cut, at line ends; None leaves it whole.
    """

    path: str
    name: str
    piece_bytes: int | None = None


def find_files(path: str | None) -> list[SourceFile]:
    """The files of a corpus in the order of their names; None is the Python standard library.

    A corpus of one plain text file is cut into pieces, because only whole documents can be held out.

    Raises:
        DataError: There is no file.
    """
    if path is None:
        return _standard_library()
    given = Path(path).expanduser()
    if given.is_file():
        plain = not given.name.endswith(_JSON_LINES + _PARQUET)
        size = given.stat().st_size
        piece = max(512, min(16384, size // 64)) if plain else None
        return [SourceFile(path=str(given), name=given.name, piece_bytes=piece)]
    if given.is_dir():
        root, found = given, [file for file in given.rglob("*") if _visible(file.relative_to(given))]
    else:
        root, found = _fixed_part(given), [Path(name) for name in glob.glob(str(given), recursive=True)]
    files = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
    if not files:
        what = "holds no files" if given.is_dir() else "does not exist"
        raise DataError(f"data.path: {path} {what}; give a file, a folder or a glob")
    return [SourceFile(path=str(files[name]), name=name) for name in sorted(files)]


def read_documents(file: SourceFile, text_field: str) -> Iterator[Document]:
    """The documents of one file in their order, without empty ones.

    Raises:
        DataError: The file does not have the format of its name, is not UTF-8, or a document lacks
            `text_field`.
    """
    try:
        if file.name.endswith(_JSON_LINES):
            found = _json_lines(file, text_field)
        elif file.name.endswith(_PARQUET):
            found = _parquet(file, text_field)
        else:
            found = _text(file)
        for document in found:
            if document.text:
                yield document
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path: {file.path} is not UTF-8 text (byte {error.start}); "
            "leave it out, for instance with a glob such as folder/**/*.txt"
        ) from None
    except OSError as error:
        raise DataError(f"data.path: cannot read {file.path}: {error.strerror or error}") from None


def held_out(names: Sequence[str], fraction: float) -> set[str]:
    """Names of the documents to hold out: those whose hash is below `fraction`, at least one and never all.

    The choice depends on each name alone, not on the order of the names.

    Raises:
        DataError: There are fewer than two documents.
    """
    if len(names) < 2:
        raise DataError(
            f"data.path: holds {len(names)} document(s); at least two are needed, one of them to be held out"
        )
    ranked = sorted(names, key=name_hash)
    chosen = {name for name in ranked if name_hash(name) < fraction} or {ranked[0]}
    return chosen if len(chosen) < len(names) else set(ranked[:-1])


def name_hash(name: str) -> float:
    """A hash of a name, evenly distributed in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2.0**64


def _standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        name.as_posix()
        for name in (file.relative_to(root) for file in root.rglob("*.py"))
        if not _NOT_SOURCE.intersection(name.parts) and not name.parts[0].startswith(("config-", "__"))
    )
    if not names:
        raise DataError(
            f"data.path: this Python has no source of its standard library at {root}; set data.path"
        )
    return [SourceFile(path=str(root / name), name=name) for name in names]


def _visible(name: Path) -> bool:
    return not any(part.startswith(".") for part in name.parts)


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _text(file: SourceFile) -> Iterator[Document]:
    if file.name.endswith(".py"):  # Source declares its own encoding.
        try:
            with tokenize.open(file.path) as source:
                text = source.read()
        except SyntaxError as error:
            raise DataError(f"data.path: {file.path}: {error}; leave it out") from None
    else:
        text = Path(file.path).read_bytes().decode("utf-8-sig")
    if file.piece_bytes is None:
        yield Document(name=file.name, text=text)
        return
    for number, piece in enumerate(_pieces(text.splitlines(keepends=True), file.piece_bytes)):
        yield Document(name=f"{file.name}#{number}", text=piece)


def _pieces(lines: Iterable[str], piece_bytes: int) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line.encode())
        if size >= piece_bytes:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _json_lines(file: SourceFile, text_field: str) -> Iterator[Document]:
    with _open(file.path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"data.path: {file.path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not JSON: {error.msg}; every line must be one JSON object"
                ) from None
            fields = record if isinstance(record, dict) else {}
            yield Document(name=f"{file.name}#{number}", text=_field(fields, text_field, where))


def _parquet(file: SourceFile, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise DataError(
                f"data.text_field: {file.path} has no column {text_field!r}; it has {', '.join(columns)}"
            )
        number = 0
        for batch in table.iter_batches(columns=[text_field], batch_size=1024):
            for text in batch.column(0).to_pylist():
                number += 1
                where = f"data.path: {file.path}, row {number}"
                yield Document(
                    name=f"{file.name}#{number}", text=_field({text_field: text}, text_field, where)
                )
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"data.path: {file.path} is not a Parquet file: {error}") from None


def _field(fields: dict[str, object], text_field: str, where: str) -> str:
    text = fields.get(text_field)
    if isinstance(text, str):
        return text
    raise DataError(f"{where}: has no text in the field {text_field!r}; set data.text_field")


def _open(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


__all__ = ["Document", "SourceFile", "find_files", "held_out", "name_hash", "read_documents"]
