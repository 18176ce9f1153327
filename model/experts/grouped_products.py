"""Matrix products of sorted rows with the matrices of their groups, one after the other or in one kernel.

Shapes: nnz rows, G groups; group g has the rows start_g … end_g.
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
    """The rows of each group, and a way to compute products over them."""

    def multiply(self, x: Tensor, weights: Tensor, *, memory: Tensor) -> Tensor:
        """Return x[start_g:end_g] @ weights[g] for each group, [nnz, N] of x [nnz, M] and weights [G, M, N].

        Args:
            memory: [nnz, N], which may be used for the result.
        """
        ...

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor, lock: Lock) -> None:
        """Add left[start_g:end_g]' @ right[start_g:end_g] to total[g] for each group.

        Args:
            total: [G, M, N], possibly of more precision than left [nnz, M] and right [nnz, N].
            lock: Held while `total` is written to, since several threads may add to it.
        """
        ...


@dataclass(frozen=True, slots=True)
class OneByOne:
    """One product for each group that has rows; for CPUs, whose cores a single product keeps busy.

    Attributes:
        counts: Number of rows of each group.
    """

    counts: list[int]

    def multiply(self, x: Tensor, weights: Tensor, *, memory: Tensor) -> Tensor:
        start = 0
        for group, n in enumerate(self.counts):
            if n:
                torch.mm(x[start : start + n], weights[group], out=memory[start : start + n])
                start += n
        return memory

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor, lock: Lock) -> None:
        # Other threads take the lock between two groups.
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
    """torch's grouped product, for GPUs in bfloat16; the CPU need not know the groups' sizes.

    Attributes:
        ends: [G] int32, end of each group's rows, on the rows' device.
    """

    ends: Tensor

    def multiply(self, x: Tensor, weights: Tensor, *, memory: Tensor) -> Tensor:
        return F.grouped_mm(x, weights, offs=self.ends)

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor, lock: Lock) -> None:
        product = F.grouped_mm(left.t(), right, offs=self.ends)
        # Some kernels write nothing for a group without rows: the memory may hold NaN.
        empty = torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0
        product.masked_fill_(empty[:, None, None], 0)
        with lock:
            total += product


def group(sorted_groups: Tensor, n_groups: int, *, like: Tensor, widths: Sequence[int]) -> Groups:
    """Groups of rows, with the way to compute products that suits their device and type.

    Args:
        sorted_groups: [nnz], the group of each row, rising.
        like: A tensor of the rows' device and type.
        widths: Widths of all matrices; torch's kernel takes rows that begin at multiples of 16 bytes alone.
    """
    in_one = like.dtype == torch.bfloat16 and not any(width * like.itemsize % _ALIGNED for width in widths)
    if like.device.type == "cpu" or not in_one:
        return OneByOne(torch.bincount(sorted_groups, minlength=n_groups).tolist())
    numbers = torch.arange(n_groups, device=sorted_groups.device, dtype=sorted_groups.dtype)
    ends = torch.searchsorted(sorted_groups.contiguous(), numbers, right=True, out_int32=True)
    return InOneKernel(to_device(ends, like.device))


__all__ = ["Groups", "InOneKernel", "OneByOne", "group"]
