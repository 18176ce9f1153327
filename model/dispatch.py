"""Dispatch and combine of routed tokens by host: which rows leave for which expert host, and their sums.

Shapes: N tokens, D hidden, K experts per token, E experts, H hosts; per host n rows and nnz (row, expert)
pairs; R ways to choose one replica of every expert. A token costs one row per host that it touches, not one
per expert.

A row of a GPU crosses to the CPU's memory once, however many hosts it goes to, and the sum over the hosts
comes back as one. Copies go through pinned memory, so that the CPU waits once for each call, and the GPU
meanwhile continues with the work in its queue: the shared expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import split_by_host
from model.device_copies import to_cpu, to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSlice:
    """The part of a batch that one host works on, in compressed rows.

    Attributes:
        row: [n] int64, token indices, ascending, each once.
        row_ptr: [n + 1] int32; the pairs of row i are row_ptr[i] … row_ptr[i + 1].
        expert: [nnz] int32, global expert ids.
        pair: [nnz] int64, flat indices into [N, K], ascending; `x.view(-1)[pair]` gathers any such x.
        gate: [nnz], the gates of the pairs, without a gradient.
    """

    row: Tensor
    row_ptr: Tensor
    expert: Tensor
    pair: Tensor
    gate: Tensor


@torch.no_grad()
def plan_dispatch(
    idx: Tensor, gates: Tensor, host_of: Tensor, n_hosts: int, shift: int = 0
) -> tuple[HostSlice | None, ...]:
    """Group (token, expert) pairs by a host that holds the expert; every pair lands on exactly one.

    Args:
        idx: [N, K] int64 chosen experts.
        gates: [N, K].
        host_of: [R, E] int64, a host of each expert; token n goes by row (n + shift) % R, so that load splits
            among replicas.
        n_hosts: H.
        shift: 0 or more.

    Returns:
        One slice per host, None where no token goes.
    """
    n_tokens, top_k = idx.shape
    if n_tokens == 0:
        return (None,) * n_hosts
    expert = idx.reshape(-1)
    if n_hosts == 1:
        everything = HostSlice(
            row=torch.arange(n_tokens, device=idx.device),
            row_ptr=torch.arange(0, expert.numel() + 1, top_k, device=idx.device, dtype=torch.int32),
            expert=expert.int(),
            pair=torch.arange(expert.numel(), device=idx.device),
            gate=gates.detach().reshape(-1),
        )
        return (everything,)
    if idx.device.type == "cpu" and gates.dtype in (torch.float32, torch.float64):
        return _counted(idx, gates.detach(), host_of, n_hosts, shift)
    way = (torch.arange(n_tokens, device=idx.device) + shift).remainder(host_of.shape[0])
    host = host_of[way.unsqueeze(1), idx].reshape(-1)
    return _sorted(expert, gates.detach().reshape(-1), host, n_tokens, n_hosts)


def _counted(
    idx: Tensor, gates: Tensor, host_of: Tensor, n_hosts: int, shift: int
) -> tuple[HostSlice | None, ...]:
    """Slices by counting, in two passes over pairs in the CPU's memory."""
    *flat, first_row, first_pair = split_by_host(
        idx.contiguous().numpy(), gates.contiguous().numpy(), host_of.numpy(), n_hosts, shift
    )
    row, row_ptr, expert, pair, gate = map(torch.from_numpy, flat)
    rows, pairs = first_row.tolist(), first_pair.tolist()
    return tuple(
        HostSlice(
            row=row[rows[h] : rows[h + 1]],
            row_ptr=row_ptr[rows[h] + h : rows[h + 1] + h + 1],
            expert=expert[pairs[h] : pairs[h + 1]],
            pair=pair[pairs[h] : pairs[h + 1]],
            gate=gate[pairs[h] : pairs[h + 1]],
        )
        if rows[h] < rows[h + 1]
        else None
        for h in range(n_hosts)
    )


def _sorted(
    expert: Tensor, gate: Tensor, host_of_pair: Tensor, n_tokens: int, n_hosts: int
) -> tuple[HostSlice | None, ...]:
    """Slices by sorting, on any device: the reference of `_counted`."""
    top_k = expert.numel() // n_tokens
    host, pair = host_of_pair.sort(stable=True)
    # (host, token) ascending: one key per row that leaves, so that rows of all hosts are found in one pass.
    key, pairs_of_row = torch.unique_consecutive(
        host * n_tokens + pair.div(top_k, rounding_mode="floor"), return_counts=True
    )
    n_rows = torch.bincount(key.div(n_tokens, rounding_mode="floor"), minlength=n_hosts).tolist()
    n_pairs = torch.bincount(host, minlength=n_hosts).tolist()
    row = torch.split_with_sizes(key.remainder(n_tokens), n_rows)
    counts = torch.split_with_sizes(pairs_of_row, n_rows)
    experts = torch.split_with_sizes(expert[pair].int(), n_pairs)
    gates = torch.split_with_sizes(gate[pair], n_pairs)
    pairs = torch.split_with_sizes(pair, n_pairs)
    return tuple(
        HostSlice(row=row[h], row_ptr=_row_ptr(counts[h]), expert=experts[h], pair=pairs[h], gate=gates[h])
        if n_rows[h]
        else None
        for h in range(n_hosts)
    )


def _row_ptr(counts: Tensor) -> Tensor:
    out = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=out[1:])
    return out


class OutgoingRows:
    """Rows [N, D] of any device, some of which go to each host.

    Args:
        rows: Not changed.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._here: Tensor | None = None

    def part(self, part: HostSlice, *, there: bool) -> Tensor:
        """The rows of one host, [n, D].

        Args:
            there: On the rows' own device; else in the CPU's memory.
        """
        if there or self._rows.device.type == "cpu":
            return _gather(self._rows, part)
        if self._here is None:
            (self._here,) = to_cpu(self._rows)
        return _gather(self._here, part)


def combine_rows(
    slices: Sequence[HostSlice | None], parts: Sequence[Tensor | None], n: int, like: Tensor
) -> Tensor:
    """[N, D]: the hosts' rows added up in the order of the hosts, first those in the CPU's memory.

    Args:
        slices: The rows that each host had.
        parts: [n, D] of each host; None where there are none.
        n: N.
        like: [0, D], of the type and device of the result.
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
    """The rows of a part; without a copy if it has all of them."""
    if part.row.numel() == rows.shape[0]:
        return rows
    return torch.index_select(rows, 0, to_device(part.row, rows.device))


__all__ = ["HostSlice", "OutgoingRows", "combine_rows", "plan_dispatch"]
