"""Checks the header of a safetensors file before the library parses it."""

from __future__ import annotations

import os
from pathlib import Path

from errors import CheckpointError
from model.checkpoints.guarded_files import WEIGHTS

_LONGEST = 64 << 20  # bytes; DeepSeek-V3 in one file would have 14 MB
_VALUES = 4_000_000
_PREFIX = 8  # bytes of the header's length


def check_header(path: Path) -> None:
    """Check that a file is a regular one whose header lies within it and is not larger than headers are.

    Everything else, such as the place and the size of each tensor, the library checks when it opens the file.

    Raises:
        FileNotFoundError: There is no file.
        CheckpointError: It is no such file.
    """
    with WEIGHTS.opened(path) as (handle, size):
        prefix = os.pread(handle, _PREFIX, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < _PREFIX or length > size - _PREFIX:
            raise CheckpointError(
                f"{path} is damaged or cut short (its header is longer than the file); copy it again"
            )
        if length > _LONGEST:
            raise WEIGHTS.refused(
                path, f"its header has {length:,} bytes, and such a header has at most {_LONGEST:,}"
            )
        header = os.pread(handle, length, _PREFIX)
    if len(header) != length:
        raise WEIGHTS.refused(path, "its size changed while it was read")
    if sum(map(header.count, (b"[", b"{", b","))) > _VALUES:
        raise WEIGHTS.refused(path, f"its header has more than {_VALUES:,} values")


__all__ = ["check_header"]
