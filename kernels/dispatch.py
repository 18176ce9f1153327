"""Grouping of routed (token, expert) pairs by host, and checks of a request's pairs on the host.

Tensor operations would sort the pairs; here they are counted in two passes.

Shapes: N tokens, K experts per token, E experts, H hosts, nnz = N·K pairs, n rows over all hosts; R ways
to choose one replica of every expert.
"""

from __future__ import annotations

import numpy as np

from kernels.compiled import compiled

FINE, MALFORMED, FOREIGN = 0, 1, 2


@compiled
def split_by_host(idx, gates, host_of, n_hosts, shift):
    """Group (token, expert) pairs by the host that computes them, each host's by token.

    Args:
        idx: [N, K] int64, experts.
        gates: [N, K].
        host_of: [R, E] int64; token n goes by row (n + shift) % R.
        shift: 0 or more.

    Returns:
        row [n] int64, row_ptr [n + H] int32 (that of each host begins with 0), expert [nnz] int32, pair [nnz]
        int64, gate [nnz], and the starts of each host's rows and pairs, both [H + 1].
    """
    n_tokens, top_k = idx.shape
    ways = host_of.shape[0]
    first = shift % ways
    here = host_of[first]
    rows = np.zeros(n_hosts + 1, np.int64)
    pairs = np.zeros(n_hosts + 1, np.int64)
    last = np.full(n_hosts, -1)  # token of each host's newest row
    way = first
    for n in range(n_tokens):
        for k in range(top_k):
            h = here[idx[n, k]]
            pairs[h + 1] += 1
            if last[h] != n:
                last[h] = n
                rows[h + 1] += 1
        if ways > 1:
            way = way + 1 if way + 1 < ways else 0
            here = host_of[way]
    for h in range(n_hosts):
        rows[h + 1] += rows[h]
        pairs[h + 1] += pairs[h]
    row = np.empty(rows[n_hosts], np.int64)
    row_ptr = np.zeros(rows[n_hosts] + n_hosts, np.int32)
    expert = np.empty(n_tokens * top_k, np.int32)
    pair = np.empty(n_tokens * top_k, np.int64)
    gate = np.empty(n_tokens * top_k, gates.dtype)
    next_row, next_pair = rows[:-1].copy(), pairs[:-1].copy()
    last[:] = -1
    way, here = first, host_of[first]
    for n in range(n_tokens):
        for k in range(top_k):
            h = here[idx[n, k]]
            if last[h] != n:
                last[h] = n
                row[next_row[h]] = n
                next_row[h] += 1
            at = next_pair[h]
            expert[at], pair[at], gate[at] = idx[n, k], n * top_k + k, gates[n, k]
            next_pair[h] += 1
            row_ptr[next_row[h] + h] = next_pair[h] - pairs[h]
        if ways > 1:
            way = way + 1 if way + 1 < ways else 0
            here = host_of[way]
    return row, row_ptr, expert, pair, gate, rows, pairs


@compiled
def localize(row_ptr, expert, local_of, local):
    """Convert global expert ids to indices into a host's shard, and check the pairs of a request.

    Args:
        row_ptr: [n + 1] int32, as a peer sent it.
        expert: [nnz] int32, as a peer sent it.
        local_of: [E] int32, -1 for experts of other hosts.
        local: [nnz] int32, written.

    Returns:
        FINE; MALFORMED where row_ptr does not rise from 0 to nnz; FOREIGN for an expert of another host.
    """
    if row_ptr[0] != 0 or row_ptr[-1] != expert.shape[0]:
        return MALFORMED
    for i in range(row_ptr.shape[0] - 1):
        if row_ptr[i] > row_ptr[i + 1]:
            return MALFORMED
    for p in range(expert.shape[0]):
        e = expert[p]  # read once: the peer may still write to it
        if e < 0 or e >= local_of.shape[0] or local_of[e] < 0:
            return FOREIGN
        local[p] = local_of[e]
    return FINE


@compiled
def count_pairs(local, ids, loads):
    """Add a request's number of pairs per expert to `loads`.

    Args:
        local: [nnz], indices into a host's shard.
        ids: [n_local] int64, the shard's global ids.
        loads: [E] int64, written.
    """
    for p in range(local.shape[0]):
        loads[ids[local[p]]] += 1


__all__ = ["FINE", "FOREIGN", "MALFORMED", "count_pairs", "localize", "split_by_host"]
