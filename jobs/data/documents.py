"""The documents of a corpus: each a text with a stable name, by which some are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from errors import DataError
from jobs.console import counted
from jobs.data.file_formats import UnreadableFile, records
from jobs.data.source_files import SourceFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, and a name that does not depend on where the corpus is stored."""

    name: str
    text: str


def read_documents(
    file: SourceFile, text_field: str, *, skipped: Callable[[str], None] | None = None
) -> Iterator[Document]:
    """The documents of one file in their order, without empty ones.

    Args:
        text_field: Field or column with a document's text (JSON, Parquet).
        skipped: Called with one line for each record, or rest of a file, that cannot be read and is left out;
            None raises that line as an error.

    Raises:
        DataError: A record cannot be read; names file and record.
    """
    found = records(file.path, file.name, text_field)
    while True:
        try:
            place, text, problem = next(found)
        except StopIteration:
            return
        except UnreadableFile as error:
            _report(f"data.path: {file.path} {error}", skipped)
            return
        if text is None:
            _report(f"data.path: {file.path}, {place}: {problem}", skipped)
        elif text and place:
            yield Document(name=f"{file.name}#{place.rpartition(' ')[2]}", text=text)
        elif text and file.piece_bytes is None:
            yield Document(name=file.name, text=text)
        elif text:
            pieces = _pieces(text.splitlines(keepends=True), file.piece_bytes or 0)
            for number, piece in enumerate(pieces):
                yield Document(name=f"{file.name}#{number}", text=piece)


def held_out(names: Sequence[str], fraction: float, *, path: str | None = None) -> set[str]:
    """Names of the documents to hold out: those whose hash is below `fraction`, at least one and never all.

    The choice depends on each name alone, not on the order of the names.

    Args:
        names: Names of the documents that have text.
        fraction: The part of the documents to hold out.
        path: `data.path`, for the error.

    Raises:
        DataError: There are fewer than two documents.
    """
    if len(names) < 2:
        raise DataError(
            f"data.path: {path} holds {counted(len(names), 'document')} with text; at least two are needed, "
            "one of them to be held out: add files, or records to a JSON Lines file"
        )
    ranked = sorted(names, key=name_hash)
    chosen = {name for name in ranked if name_hash(name) < fraction} or {ranked[0]}
    return chosen if len(chosen) < len(names) else set(ranked[:-1])


def name_hash(name: str) -> float:
    """A hash of a name, evenly distributed in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2.0**64


def _report(line: str, skipped: Callable[[str], None] | None) -> None:
    line = line.encode("utf-8", "backslashreplace").decode()  # paths and names of fields may hold any bytes
    if skipped is None:
        raise DataError(line) from None
    skipped(line)


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


__all__ = ["Document", "held_out", "name_hash", "read_documents"]
