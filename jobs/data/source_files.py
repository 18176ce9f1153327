"""The files of a corpus: one file, all files below a folder, or those that a glob matches."""

from __future__ import annotations

import glob
import os
import stat
import sysconfig
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from errors import DataError
from jobs.data.file_formats import is_plain_text

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
_Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
        path: Path of the file.
        name: Path of the file within the corpus; bytes of it that are not UTF-8 are escaped.
        piece_bytes: Size of the documents into which the text is cut, at line ends; None leaves it whole.
    """

    path: str
    name: str
    piece_bytes: int | None = None


def find_files(path: str | None) -> list[SourceFile]:
    """The files of a corpus in the order of their names; None is the Python standard library.

    Folders and globs follow links to folders, give each file once, and leave out names that begin with a
    dot (a glob matches them where it has the dot). A corpus of one plain text file is cut into pieces,
    because only whole documents can be held out.

    Raises:
        DataError: There is no file, or a folder cannot be read.
    """
    if path is None:
        return _standard_library()
    given = Path(path).expanduser()
    if given.is_file():
        size = given.stat().st_size
        piece = max(512, min(16384, size // 64)) if is_plain_text(given.name) else None
        return [SourceFile(path=str(given), name=_name((given.name,)), piece_bytes=piece)]
    if given.is_dir():
        root, found = given, list(_walk(given, _visible, _visible))
        missing = "holds no files"
    elif glob.has_magic(str(given)):
        root, pattern = _split(given)
        found = list(_walk(root, lambda at: _left_after(at, pattern), lambda at: _matches(at, pattern)))
        missing = "does not exist: no file matches (** stands for any folders, * for no /)"
    else:
        found, missing = [], "is neither a file nor a folder" if given.exists() else "does not exist"
    if not found:
        raise DataError(f"data.path: {path} {missing}; give a file, a folder or a glob")
    files = {_name(parts): parts for parts in found}
    return [SourceFile(path=str(root.joinpath(*files[name])), name=name) for name in sorted(files)]


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


def _name(parts: Sequence[str]) -> str:
    """A file's path within the corpus, as text that can be stored."""
    return os.fsencode("/".join(parts)).decode("utf-8", "backslashreplace")


def _walk(
    root: Path, enters: Callable[[_Parts], Hashable], wanted: Callable[[_Parts], bool]
) -> Iterator[_Parts]:
    """Paths below a folder, as parts, of the wanted files, each file once.

    Links are followed after the folders that they lead to, so a file has its own name where that is wanted.
    A folder is walked again only where another name of it can lead to other files, so links make no loops.

    Args:
        enters: What decides which files below a folder are wanted; false if none can be.
        wanted: Whether a file is wanted.

    Raises:
        DataError: A folder cannot be read.
    """
    seen: set[tuple[int, int, Hashable]] = set()
    given: set[tuple[int, int, str]] = set()
    folders: list[tuple[_Parts, Hashable]] = [((), enters(()))]
    linked: deque[tuple[_Parts, Hashable]] = deque()
    while folders or linked:
        at, below = folders.pop() if folders else linked.popleft()
        try:
            here = os.stat(root.joinpath(*at))
            if (here.st_dev, here.st_ino, below) in seen:
                continue
            seen.add((here.st_dev, here.st_ino, below))
            with os.scandir(root.joinpath(*at)) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            folder = root.joinpath(*at)
            raise DataError(
                f"data.path: cannot read the folder {folder}: {error.strerror or error}; make it readable, "
                "or leave it out with a glob"
            ) from None
        for entry in entries:
            inner, file = (*at, entry.name), (here.st_dev, here.st_ino, entry.name)
            kind = _kind(entry)
            if stat.S_ISDIR(kind) and (deeper := enters(inner)):
                (linked if entry.is_symlink() else folders).append((inner, deeper))
            elif stat.S_ISREG(kind) and file not in given and wanted(inner):
                given.add(file)
                yield inner


def _kind(entry: os.DirEntry[str]) -> int:
    """The file type of an entry, or of what it links to; 0 for a link to nothing."""
    try:
        return stat.S_IFMT(entry.stat().st_mode)
    except OSError:
        return 0


def _visible(at: _Parts) -> bool:
    return not at or not at[-1].startswith(".")


def _split(pattern: Path) -> tuple[Path, _Parts]:
    """The folder before the first wildcard, and the parts of the pattern below it."""
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    if not root.is_dir():
        raise DataError(f"data.path: {pattern}: {root} is not a folder; give a file, a folder or a glob")
    return root, parts[fixed:]


def _matches(at: _Parts, pattern: _Parts) -> bool:
    """Whether the parts of a path match those of a glob, in which ** stands for any visible folders."""
    if not pattern:
        return not at
    if pattern[0] == "**":
        rest = pattern[1:] or ("*",)
        return _matches(at, rest) or (bool(at) and _visible(at[:1]) and _matches(at[1:], pattern))
    return bool(at) and _matches_part(at[0], pattern[0]) and _matches(at[1:], pattern[1:])


def _left_after(at: _Parts, pattern: _Parts) -> frozenset[_Parts]:
    """The ends of a glob that paths below a folder have to match; none if no path below it matches."""
    if not at:
        return frozenset({pattern} if pattern else ())
    if not pattern:
        return frozenset()
    if pattern[0] == "**":
        deeper = _left_after(at[1:], pattern) if _visible(at[:1]) else frozenset()
        return deeper | _left_after(at, pattern[1:])
    return _left_after(at[1:], pattern[1:]) if _matches_part(at[0], pattern[0]) else frozenset()


def _matches_part(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))


__all__ = ["SourceFile", "find_files"]
