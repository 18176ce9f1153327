"""Products of sorted rows with their groups' matrices: one after the other, or in one kernel.

Shapes: nnz rows, G groups, of which group g has the rows start_g … end_g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.device_copies import to_device

_ALIGNED = 16


class Groups(Protocol):
    """Where each group's rows end, and how products over them are computed."""

    def multiply(self, x: Tensor, weights: Tensor, *, memory: Tensor) -> Tensor:
        """[nnz, N]: x[start_g:end_g] @ weights[g] for each group, x [nnz, M] and weights [G, M, N].

        Args:
            memory: [nnz, N] that may be used for it.
        """
        ...

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor, lock: Lock) -> None:
        """total[g] += left[start_g:end_g]' @ right[start_g:end_g] for each group.

        Args:
            total: [G, M, N], which may be of more precision than left [nnz, M] and right [nnz, N].
            lock: held while it is written to, since others may add to it, too.
        """
        ...


@dataclass(frozen=True, slots=True)
class OneByOne:
    """A product for each group that has rows; for CPUs, whose cores a single product keeps busy.

    Attributes:
        counts: rows of each group.
    """

    counts: list[int]

    def multiply(self, x: Tensor, weights: Tensor, *, memory: Tensor) -> Tensor:
        """See `Groups.multiply`."""
        start = 0
        for group, n in enumerate(self.counts):
            if n:
                torch.mm(x[start : start + n], weights[group], out=memory[start : start + n])
                start += n
        return memory

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor, lock: Lock) -> None:
        """See `Groups.add_outer`; the lock is let go between groups."""
        start = 0
        for group, n in enumerate(self.counts):
            if n:
                one, other = left[start : start + n].t(), right[start : start + n]
                if total.dtype == left.dtype:
                    with lock:
                        total[group].addmm_(one, other)
                else:
                    product = one @ other
                    with lock:
                        total[group] += product
                start += n


@dataclass(frozen=True, slots=True)
class InOneKernel:
    """torch's grouped product, for GPUs in bfloat16: nothing of the groups' sizes is known to the CPU.

    Attributes:
        ends: [G] int32, on the rows' device.
    """

    ends: Tensor

    def multiply(self, x: Tensor, weights: Tensor, *, memory: Tensor) -> Tensor:
        """See `Groups.multiply`."""
        return F.grouped_mm(x, weights, offs=self.ends)

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor, lock: Lock) -> None:
        """See `Groups.add_outer`."""
        product = F.grouped_mm(left.t(), right, offs=self.ends)
        # Some kernels write nothing for a group without rows: what is there may be no number.
        empty = torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0
        product.masked_fill_(empty[:, None, None], 0)
        with lock:
            total += product


def group(sorted_groups: Tensor, n_groups: int, *, like: Tensor, widths: Sequence[int]) -> Groups:
    """The groups of rows.

    Args:
        sorted_groups: [nnz], the group of each row, rising.
        like: a tensor of the rows' device and type, which decide how products are computed.
        widths: of all matrices; torch's kernel wants rows that begin at multiples of 16 bytes.
    """
    in_one = like.dtype == torch.bfloat16 and not any(width * like.itemsize % _ALIGNED for width in widths)
    if like.device.type == "cpu" or not in_one:
        return OneByOne(torch.bincount(sorted_groups, minlength=n_groups).tolist())
    numbers = torch.arange(n_groups, device=sorted_groups.device, dtype=sorted_groups.dtype)
    ends = torch.searchsorted(sorted_groups.contiguous(), numbers, right=True, out_int32=True)
    return InOneKernel(to_device(ends, like.device))


__all__ = ["Groups", "InOneKernel", "OneByOne", "group"]
