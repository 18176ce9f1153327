"""Routing of a few rows: affinities, node-limited top-k and gates in one function.

The reference is `model.routing`. Shapes: N rows, D hidden, E experts, K experts per row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.compiled import compiled_reordered
from kernels.constants import MIN_GATE_SUM
from kernels.linear import project

Array = npt.NDArray[Any]


class GateWeights(NamedTuple):
    """A gate, and the rule by which it chooses experts.

    Attributes:
        centroids: [E, D], e_i of eq. 15.
        bias: [E], b_i of eq. 16, for the choice alone.
        top_k: K.
        n_group: groups of n_routed_experts / n_group neighbouring experts.
        topk_group: groups that a row may use.
        group_experts: best experts of a group whose scores add up to the group's.
        by_bias: whether groups are scored by biased affinities.
        normalize: divide gates by their sum (eq. 13).
        factor: routed_scaling_factor.
    """

    centroids: Array
    bias: Array
    top_k: int
    n_group: int
    topk_group: int
    group_experts: int
    by_bias: bool
    normalize: bool
    factor: float


@compiled_reordered
def route(x, gate, idx, gates):
    """Route rows x [N, D]: chosen experts into idx [N, K], their gates into gates [N, K] (eq. 13, 15, 16).

    Args:
        gate: a `GateWeights` as a plain tuple.
    """
    w = GateWeights(*gate)
    n_experts = w.centroids.shape[0]
    one = x.dtype.type(1)
    dots = np.empty((x.shape[0], n_experts), x.dtype)
    project(x, w.centroids, dots)
    scores = np.empty(n_experts, x.dtype)
    choice = np.empty(n_experts, x.dtype)
    for n in range(x.shape[0]):
        for e in range(n_experts):
            scores[e] = one / (one + np.exp(-dots[n, e]))
            choice[e] = scores[e] + w.bias[e]
        if w.topk_group < w.n_group:
            _mask_groups(choice, choice if w.by_bias else scores, w.group_experts, w.n_group, w.topk_group)
        total = x.dtype.type(0)
        for k in range(w.top_k):
            best = _best(choice, 0, n_experts)
            choice[best] = -np.inf
            idx[n, k] = best
            gates[n, k] = scores[best]
            total += scores[best]
        scale = x.dtype.type(w.factor)
        if w.normalize:
            scale /= total + x.dtype.type(MIN_GATE_SUM)
        for k in range(w.top_k):
            gates[n, k] *= scale


@compiled_reordered
def _mask_groups(choice, judged, summed, n_group, topk_group):
    """Set `choice` to -inf outside the groups whose `summed` best `judged` values have the largest sums."""
    per_group = choice.shape[0] // n_group
    left = judged.copy()
    group = np.empty(n_group, judged.dtype)
    for g in range(n_group):
        group[g] = 0
        for _ in range(summed):
            best = _best(left, g * per_group, (g + 1) * per_group)
            group[g] += left[best]
            left[best] = -np.inf
    dropped = np.ones(n_group, np.bool_)
    for _ in range(topk_group):
        best = _best(group, 0, n_group)
        group[best] = -np.inf
        dropped[best] = False
    for e in range(choice.shape[0]):
        if dropped[e // per_group]:
            choice[e] = -np.inf


@compiled_reordered
def _best(values, start, end):
    """Index of the largest of values[start:end]; of equals the first."""
    best = start
    for i in range(start + 1, end):
        if values[i] > values[best]:
            best = i
    return best


__all__ = ["GateWeights", "route"]
