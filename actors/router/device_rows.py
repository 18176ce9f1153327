"""Rows of a GPU on their way to hosts and back, over channels of the GPU's own or the CPU's memory.

A token's row crosses to the CPU once, however many hosts it goes to, and the sum over the hosts comes back as
one. Copies go through pinned memory, so that the CPU waits once for each call, and the GPU goes on with
whatever has been queued meanwhile: the shared expert.

Shapes: N tokens, D hidden; n rows of them for one host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.dispatch import HostSlice
from model.transfer import to_cpu, to_device


class Outgoing:
    """Rows [N, D] of any device, of which each host gets some.

    Args:
        rows: stay as they are.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._here: Tensor | None = None

    def part(self, part: HostSlice, *, there: bool) -> Tensor:
        """[n, D]: the rows of one host.

        Args:
            there: on the rows' own device; else in the CPU's memory.
        """
        if there or self._rows.device.type == "cpu":
            return _gather(self._rows, part)
        if self._here is None:
            (self._here,) = to_cpu(self._rows)
        return _gather(self._here, part)


def add_up(
    slices: Sequence[HostSlice | None], parts: Sequence[Tensor | None], n: int, like: Tensor
) -> Tensor:
    """[N, D]: the hosts' rows added up in the order of the hosts, first those in the CPU's memory.

    Args:
        slices: which rows each host had.
        parts: [n, D] of each host; None where there are none.
        n: N.
        like: [0, D], of the type and device of what is wanted.
    """
    here = [None if part is None or part.device.type != "cpu" else part for part in parts]
    total = _add_up(slices, here, n, None)
    if like.device.type != "cpu":
        there = [None if part is None or part.device.type == "cpu" else part for part in parts]
        total = _add_up(slices, there, n, None if total is None else to_device(total, like.device))
    return like.new_zeros(n, like.shape[-1]) if total is None else total


def _add_up(
    slices: Sequence[HostSlice | None], parts: Sequence[Tensor | None], n: int, total: Tensor | None
) -> Tensor | None:
    for part, rows in zip(slices, parts, strict=True):
        if part is None or rows is None:
            continue
        whole = rows.shape[0] == n
        if total is None:
            total = rows if whole else rows.new_zeros(n, rows.shape[1])
            if whole:
                continue
        if whole:
            total += rows
        else:
            total.index_add_(0, to_device(part.row, rows.device), rows)
    return total


def _gather(rows: Tensor, part: HostSlice) -> Tensor:
    """All of them need no copy."""
    if part.row.numel() == rows.shape[0]:
        return rows
    return torch.index_select(rows, 0, to_device(part.row, rows.device))


__all__ = ["Outgoing", "add_up"]
