"""What the positions of one step need, worked out once for all layers.

Shapes: N positions of all sequences one after the other; a group is b sequences with n positions each that
attend together, to T cached positions at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Neighbouring positions of one sequence.

    Attributes:
        pages: of the sequence; they hold at least `end` positions.
        start, end: positions start … end - 1.
        tokens: that are there.
    """

    pages: Sequence[int]
    start: int
    end: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Stretches of one length.

    Attributes:
        rows: their part of the N positions.
        sequences: b.
        slots: [b·T] of the cache, of all positions that may be seen.
        mask: [b, n, 1, T], -inf where a position must not look; None where all see everything.
    """

    rows: slice
    sequences: int
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's positions.

    Attributes:
        tokens: [N] int64.
        slots: [N] int64, where their entries go.
        turns: [N, 1, R / 2] complex, the rotation of each position.
        groups: who attends to what.
        ends: row after the last one of each stretch, in the order of the stretches.
    """

    tokens: Tensor
    slots: Tensor
    turns: Tensor
    groups: tuple[Group, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedBatch:
    """A step's positions in two halves, of which one computes while the experts of the other are away.

    Attributes:
        halves: one after the other; where a stretch was cut, the second half sees the first.
        ends: of the whole, see `Batch.ends`.
    """

    halves: tuple[Batch, Batch]
    ends: tuple[int, ...]


def by_length(stretch: Stretch) -> int:
    """Sort stretches by this before `collect`, so that those of a length are together."""
    return stretch.end - stretch.start


def collect(stretches: Sequence[Stretch], *, page_size: int, turns: Tensor, dtype: torch.dtype) -> Batch:
    """Lay stretches out, in the order given; neighbours of one length make a group.

    Args:
        turns: [positions, R / 2] complex, the rotation of every position there is.
        dtype: of the masks.
    """
    device = turns.device
    tokens: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    for stretch in stretches:
        tokens += stretch.tokens
        positions += range(stretch.start, stretch.end)
        slots += [
            stretch.pages[at // page_size] * page_size + at % page_size
            for at in range(stretch.start, stretch.end)
        ]
        ends.append(len(tokens))
    groups: list[Group] = []
    row = 0
    for n, members in groupby(stretches, by_length):
        same = list(members)
        groups.append(_group(same, row, n, page_size, dtype, device))
        row += n * len(same)
    place = on_device(device, positions)
    return Batch(
        tokens=on_device(device, tokens),
        slots=on_device(device, slots),
        turns=turns.index_select(0, place).unsqueeze(1),
        groups=tuple(groups),
        ends=tuple(ends),
    )


def halved(stretches: Sequence[Stretch]) -> tuple[list[Stretch], list[Stretch]]:
    """Cut stretches of two positions or more into two halves of as many positions, to one."""
    left = sum(map(by_length, stretches)) // 2
    first: list[Stretch] = []
    second: list[Stretch] = []
    for stretch in stretches:
        cut = min(left, by_length(stretch))
        left -= cut
        if cut:
            first.append(_part(stretch, 0, cut))
        if cut < by_length(stretch):
            second.append(_part(stretch, cut, by_length(stretch)))
    return first, second


def _part(stretch: Stretch, start: int, end: int) -> Stretch:
    if end - start == by_length(stretch):
        return stretch
    return Stretch(
        pages=stretch.pages,
        start=stretch.start + start,
        end=stretch.start + end,
        tokens=stretch.tokens[start:end],
    )


def _group(
    members: Sequence[Stretch], row: int, n: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> Group:
    longest = max(stretch.end for stretch in members)
    n_pages = -(-longest // page_size)
    within = torch.arange(page_size, device=device)
    table = on_device(
        device, [[*stretch.pages[:n_pages], *[0] * (n_pages - len(stretch.pages))] for stretch in members]
    )
    slots = (table.unsqueeze(2) * page_size + within).flatten(1)[:, :longest]
    rows = slice(row, row + n * len(members))
    mask = None
    if n > 1 or any(stretch.end != longest for stretch in members):
        last = on_device(device, [list(range(s.start, s.end)) for s in members])
        unseen = torch.arange(longest, device=device) > last.unsqueeze(-1)
        mask = torch.zeros(unseen.shape, dtype=dtype, device=device)
        mask = mask.masked_fill_(unseen, float("-inf")).unsqueeze(2)
    return Group(rows=rows, sequences=len(members), slots=slots.flatten(), mask=mask)


def on_device(device: torch.device, values: list[Any]) -> Tensor:
    """Numbers, on a GPU soon, without the CPU's waiting for it."""
    made = torch.tensor(values)
    return made if device.type == "cpu" else made.to(device, non_blocking=True)


__all__ = ["Batch", "Group", "PairedBatch", "Stretch", "by_length", "collect", "halved", "on_device"]
