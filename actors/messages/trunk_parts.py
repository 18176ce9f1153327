"""Names of trunk snapshots in hosts' memory: a whole trunk, or one part for each worker."""

from __future__ import annotations

import re
from collections.abc import Collection

TRUNK = "trunk"
"""Name of a whole trunk, and the beginning of the names of parts."""

_PART = re.compile(rf"{TRUNK}-(\d+)-of-(\d+)")


def part_name(rank: int, parts: int) -> str:
    """Name of the part of worker `rank`, of `parts` workers."""
    return f"{TRUNK}-{rank}-of-{parts}"


def part_of(name: str) -> tuple[int, int] | None:
    """(rank, parts) of a part's name; None for other names."""
    found = _PART.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


def complete(names: Collection[str]) -> tuple[str, ...]:
    """Names that make up a whole trunk, in order, among the names of one step; empty if there are none."""
    if TRUNK in names:
        return (TRUNK,)
    for parts in sorted({part[1] for part in map(part_of, names) if part is not None}):
        needed = tuple(part_name(rank, parts) for rank in range(parts))
        if needed and set(needed) <= set(names):
            return needed
    return ()


__all__ = ["TRUNK", "complete", "part_name", "part_of"]
