"""The directory of a run, locked by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import ConfigError

_LOCK = ".lock"


@contextmanager
def run_directory(path: Path) -> Iterator[Path]:
    """Create and lock a run's directory; yield its absolute path.

    A new directory that is still empty at the end is deleted.

    Raises:
        ConfigError: It cannot be written to, or another process has locked it.
    """
    try:
        directory = path.expanduser().resolve()
        made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"--output {path} cannot be written to ({error}); give another directory") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(handle, 32, 0).decode(errors="replace") or "unknown"
            raise ConfigError(
                f"--output {directory} is in use by another run (process {holder}); give another directory"
            ) from None
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield directory
    finally:
        os.close(handle)
        if made and {entry.name for entry in directory.iterdir()} <= {_LOCK}:
            (directory / _LOCK).unlink(missing_ok=True)
            directory.rmdir()


__all__ = ["run_directory"]
