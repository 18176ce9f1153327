"""Reads files of a corpus in bounded memory: regular files, and of compressed ones no more than text has."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.checkpoints.guarded_files import NoRegularFile, open_regular

LARGEST_TEXT = 1 << 30
"""Bytes of the largest text that is read in one piece, decompressed: a plain text, a JSON file, a line."""

MOST_VALUES = 32_000_000
"""Values of the JSON in one piece of text; commas and brackets within strings are counted, too."""

_EXPANSION = 200  # text is compressed to a third or, of logs, a fiftieth; what expands more is made to
_FREE_EXPANSION = 64 << 20  # bytes that any file may expand to
_BUFFER, _CHUNK = 64 << 10, 1 << 20


class UnreadableFile(Exception):
    """The rest of a file cannot be read; the text says why, and what to do."""


def most_expanded(size: int) -> int:
    """Bytes of text that a compressed file of `size` bytes may hold."""
    return _FREE_EXPANSION + _EXPANSION * size


def too_expanded(size: int) -> UnreadableFile:
    """The error for a compressed file of `size` bytes that holds more."""
    return UnreadableFile(
        f"has {size:,} bytes and decompresses to more than {most_expanded(size):,}, which no text does; "
        "decompress it yourself if you trust it, or leave it out"
    )


@contextmanager
def regular_file(path: str) -> Iterator[io.BufferedIOBase]:
    """A regular file, opened for reading.

    Raises:
        UnreadableFile: It is something else, which is not opened.
        OSError: It cannot be opened.
    """
    try:
        handle = open_regular(Path(path))
    except NoRegularFile as error:
        raise UnreadableFile(f"cannot be read: {error}; leave it out") from None
    with io.BufferedReader(io.FileIO(handle), _BUFFER) as file:
        yield file


@contextmanager
def decompressed(path: str) -> Iterator[io.BufferedIOBase]:
    """A file's contents, decompressed where its suffix says so.

    Raises:
        UnreadableFile: It is no regular file; reading it raises the same where it holds more than
            `most_expanded`.
        OSError: It cannot be opened.
    """
    lower = path.lower()
    with regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if lower.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield io.BufferedReader(_Bounded(unpacked, size), _BUFFER)
        elif lower.endswith(".zst"):
            import pyarrow

            with pyarrow.input_stream(pyarrow.PythonFile(file, "r"), compression="zstd") as stream:
                yield io.BufferedReader(_Bounded(stream, size), _BUFFER)
        else:
            yield file


def read_whole(path: str) -> bytes:
    """A file's contents, decompressed.

    Raises:
        UnreadableFile: It is no regular file, or holds more than `LARGEST_TEXT` or `most_expanded`.
        OSError: It cannot be opened.
    """
    parts, left = [], LARGEST_TEXT
    with decompressed(path) as file:
        while part := file.read(_CHUNK):
            left -= len(part)
            if left < 0:
                raise UnreadableFile(
                    f"holds more than {LARGEST_TEXT:,} bytes and is read whole; split it, or write JSON lines"
                )
            parts.append(part)
    return b"".join(parts)


def read_lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The lines of a file.

    Raises:
        UnreadableFile: One of them has more than `LARGEST_TEXT` bytes.
    """
    number = 0
    while line := file.readline(LARGEST_TEXT + 1):
        number += 1
        if len(line) > LARGEST_TEXT:
            raise UnreadableFile(f"has more than {LARGEST_TEXT:,} bytes in line {number}; split it")
        yield line


def excess_of_values(text: bytes) -> str:
    """In words, that the JSON in a text has more than `MOST_VALUES`; empty if it has not.

    An empty list has 2 bytes in a text and 64 in memory.
    """
    found = sum(map(text.count, (b"[", b"{", b",")))
    return f"JSON of more than {MOST_VALUES:,} values" if found > MOST_VALUES else ""


class _Bounded(io.RawIOBase):
    """What is decompressed of a file, up to a multiple of its size.

    Args:
        source: What reads and decompresses.
        size: Bytes of the compressed file.
    """

    def __init__(self, source: io.BufferedIOBase, size: int) -> None:
        self._source, self._size, self._left = source, size, most_expanded(size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._source.read1(len(buffer))  # what comes before damage is read
        self._left -= len(data)
        if self._left < 0:
            raise too_expanded(self._size)
        buffer[: len(data)] = data
        return len(data)


__all__ = [
    "LARGEST_TEXT",
    "MOST_VALUES",
    "UnreadableFile",
    "decompressed",
    "excess_of_values",
    "most_expanded",
    "read_lines",
    "read_whole",
    "regular_file",
    "too_expanded",
]
