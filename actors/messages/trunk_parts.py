"""Names of what workers leave of the trunk in hosts' memory: a whole one, or parts that make one. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection

TRUNK = "trunk"
"""A whole trunk, and the beginning of the names of parts."""

_PART = re.compile(rf"{TRUNK}-(\d+)-of-(\d+)")


def part_name(rank: int, parts: int) -> str:
    """The part that worker `rank` of `parts` leaves."""
    return f"{TRUNK}-{rank}-of-{parts}"


def part_of(name: str) -> tuple[int, int] | None:
    """The inverse of `part_name`; None for other names."""
    found = _PART.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


def complete(names: Collection[str]) -> tuple[str, ...]:
    """Of names of one step, some that make a whole trunk, in order; none where nothing does."""
    if TRUNK in names:
        return (TRUNK,)
    for parts in sorted({part[1] for part in map(part_of, names) if part is not None}):
        needed = tuple(part_name(rank, parts) for rank in range(parts))
        if needed and set(needed) <= set(names):
            return needed
    return ()


__all__ = ["TRUNK", "complete", "part_name", "part_of"]
