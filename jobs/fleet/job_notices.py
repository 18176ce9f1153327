"""Notices of the jobs of this user on this machine, by which commands find them without Ray.

A job leaves a small file while it runs, and holds a lock on it that ends with its process: a file that can be
locked is left over, and is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class JobNotice:
    """Where a job is reached.

    Attributes:
        id: Id of the job.
        name: Name of the run's directory, or of the served model.
        cluster: Address of the Ray cluster.
        coordinator: Address of the coordinator, `grpc:HOST:PORT`.
    """

    id: str
    name: str
    cluster: str
    coordinator: str


def notices_folder() -> Path:
    """The folder of this user's notices on this machine."""
    return Path(tempfile.gettempdir()) / f"raymoe-jobs-{os.getuid()}"


@contextmanager
def posted(notice: JobNotice, folder: Path | None = None) -> Iterator[None]:
    """Keep a notice as long as this context lasts.

    Where it cannot be written there is none; the job is then found through Ray.
    """
    folder = folder or notices_folder()
    file = folder / f"{notice.id}.json"
    handle = -1
    with suppress(OSError):
        handle = _post(notice, folder, file)
    try:
        yield
    finally:
        if handle >= 0:
            file.unlink(missing_ok=True)
            os.close(handle)


def local_jobs(folder: Path | None = None) -> list[JobNotice]:
    """The notices of all jobs that live, by name; left-over ones are removed."""
    folder = folder or notices_folder()
    if not _is_own(folder):
        return []
    found = [_read(file) for file in sorted(folder.glob("*.json"))]
    return sorted((one for one in found if one is not None), key=lambda one: (one.name, one.id))


def _post(notice: JobNotice, folder: Path, file: Path) -> int:
    """Write a notice; its open descriptor, which holds the lock.

    Raises:
        OSError: It cannot be written, or the folder is another user's.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_own(folder):
        raise PermissionError(f"{folder} is not this user's alone")
    making = file.with_suffix(".tmp")
    handle = os.open(making, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, json.dumps(asdict(notice)).encode())
        making.rename(file)  # it is locked from the first moment that it can be seen
    except OSError:
        os.close(handle)
        making.unlink(missing_ok=True)
        raise
    return handle


def _read(file: Path) -> JobNotice | None:
    """The notice in a file; None if its job is no more, after which the file is removed."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # its job holds the lock
            return JobNotice(**json.loads(file.read_text(encoding="utf-8")))
        file.unlink(missing_ok=True)
        return None
    except (OSError, ValueError, TypeError):  # removed meanwhile, or of another version
        return None
    finally:
        os.close(handle)


def _is_own(folder: Path) -> bool:
    """Whether a folder belongs to this user, and nobody else can write to it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and found.st_uid == os.getuid()
        and not found.st_mode & 0o022
    )


__all__ = ["JobNotice", "local_jobs", "notices_folder", "posted"]
