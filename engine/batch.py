"""The positions of one step: their tokens, cache slots, rotations and attention masks, for all layers.

Shapes: N positions of all sequences, one sequence after the other; a group has b sequences with n positions
each, which attend to at most T cached positions.
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
    """Consecutive positions of one sequence.

    Attributes:
        pages: Pages of the sequence, for at least `end` positions.
        start: First position.
        end: Position after the last one.
        tokens: Tokens at these positions.
    """

    pages: Sequence[int]
    start: int
    end: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceGroup:
    """Stretches of the same length, whose attention is computed together.

    Attributes:
        rows: The group's part of the N positions.
        sequences: Number of sequences, b.
        slots: [b·T], cache slots of the positions that are attended to.
        mask: [b, n, 1, T], -inf for positions that must not be attended to; None without such positions.
    """

    rows: slice
    sequences: int
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The positions of one step.

    Attributes:
        tokens: [N] int64.
        slots: [N] int64, cache slots of the positions' own entries.
        turns: [N, 1, R / 2] complex, rotary rotation of each position.
        groups: Stretches grouped by length.
        ends: Row after the last one of each stretch, in the order of the stretches.
    """

    tokens: Tensor
    slots: Tensor
    turns: Tensor
    groups: tuple[SequenceGroup, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedBatch:
    """The positions of one step in two halves; one half computes while the other waits for its experts.

    Attributes:
        halves: The halves; where a stretch was cut, the second half attends to the first.
        ends: Row after the last one of each stretch, over both halves.
    """

    halves: tuple[Batch, Batch]
    ends: tuple[int, ...]


def by_length(stretch: Stretch) -> int:
    """Length of a stretch: the key that stretches are sorted by before `collect`."""
    return stretch.end - stretch.start


def collect(stretches: Sequence[Stretch], *, page_size: int, turns: Tensor, dtype: torch.dtype) -> Batch:
    """The batch of these stretches, in the order given; consecutive stretches of one length form a group.

    Args:
        stretches: The stretches, sorted by length.
        page_size: Positions of a page.
        turns: [positions, R / 2] complex, rotary rotations of all positions.
        dtype: Type of the masks.
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
    groups: list[SequenceGroup] = []
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
    """Divide stretches into two halves whose numbers of positions differ by at most one."""
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
) -> SequenceGroup:
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
    return SequenceGroup(rows=rows, sequences=len(members), slots=slots.flatten(), mask=mask)


def on_device(device: torch.device, values: list[Any]) -> Tensor:
    """A tensor of numbers on a device; the copy to a GPU is asynchronous."""
    made = torch.tensor(values)
    return made if device.type == "cpu" else made.to(device, non_blocking=True)


__all__ = ["Batch", "PairedBatch", "SequenceGroup", "Stretch", "by_length", "collect", "halved", "on_device"]
