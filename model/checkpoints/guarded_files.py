"""Reads files that others have written: regular files alone, up to a size, whole.

A checkpoint may come from anybody. Opening a named pipe would block for ever, and a sparse file of gigabytes
costs its author nothing; so every file of a checkpoint or a tokenizer is opened here, by the limits of its
kind. Links are followed: caches of models consist of them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import CheckpointError, UsageError
from model.checkpoints.guarded_json import parse_object

_MIB = 1 << 20
_CHUNK = 16 << 20
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileGuard:
    """Limits of one kind of file.

    Attributes:
        size: Bytes that a file may have.
        values: Values that its JSON may have.
        finite: Whether its JSON may not have NaN and Infinity.
        grows: Whether lines may be appended while it is read; it is then read as far as it went when opened.
        fix: What to do about a file beyond the limits, for the error.
        error: Type of the error.
    """

    size: int
    values: int = 0
    finite: bool = True
    grows: bool = False
    fix: str = "copy it again"
    error: type[UsageError] = CheckpointError

    def read(self, path: Path) -> bytes:
        """The contents of a file.

        Raises:
            FileNotFoundError: There is no file.
            UsageError: It is no regular file, too large, unreadable, or changes meanwhile; of type `error`.
        """
        with self.opened(path) as (handle, size):
            beyond = 0 if self.grows else 1  # a byte more shows that the file has grown
            parts, left = [], size + beyond
            while left and (part := os.read(handle, min(left, _CHUNK))):
                parts.append(part)
                left -= len(part)
            if left != beyond:
                raise self.refused(path, "its size changed while it was read")
        return b"".join(parts)

    def text(self, path: Path) -> str:
        """The contents of a text file in UTF-8.

        Raises:
            FileNotFoundError: There is no file.
            UsageError: As `read`, or it is not UTF-8.
        """
        try:
            return self.read(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refused(path, f"byte {error.start} is not UTF-8") from None

    def json(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file.

        Raises:
            FileNotFoundError: There is no file.
            UsageError: As `read`, or it is no JSON object, or one beyond the limits of `guarded_json`.
        """
        try:
            return parse_object(self.read(path), values=self.values, finite=self.finite)
        except ValueError as error:
            raise self.refused(path, str(error)) from None

    def check(self, path: Path) -> None:
        """Check that a path is a regular file that can be opened and is not too large.

        Raises:
            FileNotFoundError: There is no file.
            UsageError: It is something else; of type `error`.
        """
        with self.opened(path):
            pass

    @contextmanager
    def opened(self, path: Path) -> Iterator[tuple[int, int]]:
        """A descriptor of a file, and the file's size.

        Raises:
            FileNotFoundError: There is no file.
            UsageError: As `check`, or reading it fails.
        """
        try:
            handle = open_regular(path)
            try:
                size = os.fstat(handle).st_size
                if size > self.size:
                    raise self.refused(
                        path, f"it has {size:,} bytes, and such a file has at most {self.size:,}"
                    )
                yield handle, size
            finally:
                os.close(handle)
        except FileNotFoundError:
            raise
        except NoRegularFile as error:
            raise self.refused(path, str(error)) from None
        except OSError as error:
            raise self.refused(path, error.strerror or str(error)) from None

    def refused(self, path: Path, reason: str) -> UsageError:
        """The error for a file that cannot be used."""
        return self.error(f"{path} cannot be read ({reason}); {self.fix}")


class NoRegularFile(Exception):
    """There is something else in a file's place; the text says what."""


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading.

    Raises:
        NoRegularFile: It is something else, which is not opened.
        OSError: It cannot be opened.
    """
    _require_regular(os.stat(path))  # opening a device can have effects
    # Without O_NONBLOCK, a pipe that has taken the file's place meanwhile would block.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _require_regular(os.fstat(handle))
    except NoRegularFile:
        os.close(handle)
        raise
    return handle


def _require_regular(found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise NoRegularFile(f"it is {_KINDS.get(kind, 'something else')}, not a file")


def is_there(path: Path) -> bool:
    """Whether there is something at a path, a file or not; nothing is where a link leads to nothing.

    `Path.is_file` is false for a pipe, which would then pass for a missing file.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # reading it says why
        return True
    return True


CONFIG = FileGuard(size=4 * _MIB, values=200_000)
"""config.json; DeepSeek-V3's has 2 KB."""

INDEX_FILE = FileGuard(size=64 * _MIB, values=1_000_000)
"""model.safetensors.index.json; that of DeepSeek-V3, of 91,991 tensors, has 9 MB."""

WEIGHTS = FileGuard(size=1 << 50)
"""A safetensors file, whose size costs nothing until its tensors are read."""

STATE = FileGuard(size=4 * _MIB, values=200_000, finite=False, fix="use an earlier checkpoint")
"""state.json of a run's checkpoint, in which the result of an evaluation can be NaN."""

VALIDATION = FileGuard(size=64 * _MIB, values=4_000_000, finite=False, fix="remove it")
"""validation.json of a run, with the load of every expert."""

METRICS = FileGuard(size=1 << 30, grows=True, fix="remove it")
"""metrics.jsonl of a run, to which a running one appends a line for each step."""

__all__ = [
    "CONFIG",
    "INDEX_FILE",
    "METRICS",
    "STATE",
    "VALIDATION",
    "WEIGHTS",
    "FileGuard",
    "NoRegularFile",
    "is_there",
    "open_regular",
]
