"""njit with a disk cache keyed by the sources of the whole package.

Numba's own cache notices a change of a function's own file alone, and not of the functions that it calls in
other files. Here compiled code lies in a folder named after a digest of all source files of the package, so
that after a change of any of them everything is compiled again.

Numba resolves the type of a plain tuple in C, and that of a NamedTuple in Python, which takes 2 µs longer. A
function that is called tens of thousands of times a second therefore takes `tuple(weights)` and begins with
`w = Weights(*weights)`, which costs nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

_FOLDER = "compiled-"
_KEPT_SECONDS = 24 * 3600.0
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call; it runs without the interpreter's lock.

    Floating-point operations run in the order in which they are written.
    """
    return _cached(njit(nogil=True, error_model="numpy")(function))


def compiled_reordered(function: Callable[..., Any]) -> Any:
    """`compiled`, but sums may be reordered so that they vectorise; infinities and NaN keep their meaning."""
    return _cached(njit(nogil=True, error_model="numpy", fastmath=_REORDERED)(function))


def _cached(dispatcher: Any) -> Any:
    dispatcher._cache = _PackageCache(dispatcher.py_func)
    return dispatcher


class _PackageLocator:
    """Location of a function's compiled code, which depends on all sources of its package.

    Args:
        found: Numba's locator, with a folder that can be written to.
        source: The function's file.
    """

    def __init__(self, found: Any, source: Path) -> None:
        self._found = found
        self._py_file = str(source)  # Numba's warnings name it
        self._digest = _digest(source.parent)
        self._path = Path(found.get_cache_path(), _FOLDER + self._digest)

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> str:
        return self._digest

    def get_disambiguator(self) -> str:
        disambiguator: str = self._found.get_disambiguator()
        return disambiguator

    def ensure_cache_path(self) -> None:
        """Create the folder, and remove those of other sources that no process has added to for a day."""
        if self._path.is_dir():
            return
        os.makedirs(self._path, exist_ok=True)
        for other in self._path.parent.glob(_FOLDER + "*"):
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > _KEPT_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)


class _PackageCacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        found: Any = self._locator
        self._locator: Any = _PackageLocator(found, Path(function.__code__.co_filename).absolute())


class _PackageCache(FunctionCache):  # type: ignore[misc]
    _impl_class = _PackageCacheImpl

    def save_overload(self, sig: Any, data: Any) -> None:
        # A process of other sources may have removed the folder: the function is compiled again next time.
        with suppress(OSError):
            super().save_overload(sig, data)


def _digest(folder: Path) -> str:
    """Digest of the names and contents of a folder's Python files."""
    files = ((path, path.stat()) for path in sorted(folder.glob("*.py")))
    return _digest_of(tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in files))


@lru_cache
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


__all__ = ["compiled", "compiled_reordered"]
