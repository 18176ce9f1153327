"""Routing: which experts a token goes to, and the weight of each expert's output.

Of arXiv 2412.19437: `affinity` is equation 15, `select_experts` equation 16 with node-limited routing
(section 2.1.2), `gate_values` equation 13. `kernels.routing` computes all three for a few rows.

Shapes: N tokens, D hidden, E routed experts, K experts per token, G groups, M groups a token may use.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from errors import ConfigError
from kernels.constants import MIN_GATE_SUM

GroupScore = Literal["biased", "affinity"]
"""The values that groups are scored by: `biased` in released checkpoints, `affinity` in the paper's text."""


def affinity(hidden: Tensor, weight: Tensor) -> Tensor:
    """Token-to-expert affinities s_i = Sigmoid(u·e_i), eq. 15 of arXiv 2412.19437.

    Args:
        hidden: [N, D].
        weight: [E, D], one centroid per expert.

    Returns:
        [N, E] in float32 whatever the inputs are, except that float64 stays float64.
    """
    wide = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    return torch.sigmoid(torch.nn.functional.linear(hidden.to(wide), weight.to(wide)))


@torch.no_grad()
def select_experts(
    scores: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: GroupScore = "biased",
    group_experts: int | None = None,
) -> Tensor:
    """Choose the experts of Topk({s_j + b_j}, K), eq. 16 of arXiv 2412.19437, within the M best groups.

    A group's score is the sum of its best entries (of s + b, or of s when `group_score` is "affinity").
    Of equal candidates the one with the lower index wins, on any device and batch.

    Args:
        scores: affinities [N, E].
        bias: [E], added for the choice alone.
        group_experts: number of best entries that score a group; None takes max(1, K // M), as the paper.

    Returns:
        [N, K] int64, best first, each expert at most once per token; carries no gradient.

    Raises:
        ConfigError: the groups do not divide the experts, or cannot hold top_k of them.
    """
    n_experts = scores.shape[-1]
    _check(n_experts, top_k=top_k, n_group=n_group, topk_group=topk_group)
    choice = scores + bias.to(scores.dtype)
    if topk_group < n_group:
        per_group = n_experts // n_group
        judged = choice if group_score == "biased" else scores
        summed = min(group_experts or max(1, top_k // topk_group), per_group)
        group = judged.view(-1, n_group, per_group).topk(summed, dim=-1).values.sum(-1)
        kept = torch.zeros_like(group, dtype=torch.bool).scatter_(-1, _stable_top(group, topk_group), True)
        # -inf, not 0: biased scores may be negative, and a dropped group must never win.
        choice.view(-1, n_group, per_group).masked_fill_(~kept.unsqueeze(-1), float("-inf"))
    return _stable_top(choice, top_k)


def gate_values(scores: Tensor, idx: Tensor, *, normalize: bool, factor: float) -> Tensor:
    """Gates g_i = s_i / Σ s_j over the chosen experts, eq. 13 and 16 of arXiv 2412.19437, times a factor.

    Args:
        scores: affinities [N, E], without the bias.
        idx: [N, K] from `select_experts`.
        normalize: divide by their sum over the K chosen experts (norm_topk_prob).
        factor: routed_scaling_factor, applied last.

    Returns:
        [N, K], differentiable with respect to `scores`.
    """
    gates = scores.gather(-1, idx)
    if normalize:
        gates = gates / (gates.sum(-1, keepdim=True) + MIN_GATE_SUM)
    return gates * factor


def _stable_top(values: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the k largest per row, best first; ties to the lower index, unlike topk."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def _check(n_experts: int, *, top_k: int, n_group: int, topk_group: int) -> None:
    if n_group < 1 or n_experts % n_group:
        raise ConfigError(
            f"n_group ({n_group}) does not divide n_routed_experts ({n_experts}): choose a divisor of it"
        )
    if not 1 <= topk_group <= n_group:
        raise ConfigError(f"topk_group ({topk_group}) must lie between 1 and n_group ({n_group})")
    reachable = n_experts // n_group * topk_group
    if not 1 <= top_k <= reachable:
        raise ConfigError(
            f"num_experts_per_tok ({top_k}) must lie between 1 and the {reachable} experts that "
            f"{topk_group} of {n_group} groups hold: lower it or raise topk_group"
        )


__all__ = ["GroupScore", "affinity", "gate_values", "select_experts"]
