"""Load balance: the update of the bias, measures of the load, and balance losses.

Shapes: B rows (sequences), T positions, N tokens, E routed experts, K per token, D devices (groups of
E / D neighbouring experts), M devices that a token may use. Masks are true where a token counts; padding
is false. Losses come without their weight α, and their gradient flows through the affinities only.

`auxiliary_loss` and `device_losses` multiply a count over all tokens (f) by a mean over all tokens (P). They
are linear in the tokens once the counts are given: with the counts of a global batch as `batch`, the losses
of its microbatches add up to the loss of the batch, however it is divided.

Sources: arXiv 2412.19437 (eq. 16-20), arXiv 2408.15664 (MaxVio), arXiv 2405.04434 (eq. 23-31).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import ConfigError
from kernels.constants import MIN_GATE_SUM


def expert_load(idx: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """Number of tokens that chose each expert: [E] int64, from idx [..., K] with mask [...].

    Counts are integers because a float counter stops growing (bfloat16 at 256, float32 at 2^24).
    """
    if idx.device.type == "cpu":
        chosen = idx if mask is None else idx[mask.to(torch.bool)]
        return torch.bincount(chosen.reshape(-1), minlength=n_experts)
    # On a GPU, bincount and a mask as an index would make the CPU wait for a length.
    counts = torch.ones_like(idx, dtype=torch.int64)
    if mask is not None:
        counts *= mask.to(torch.bool).unsqueeze(-1)
    load = torch.zeros(n_experts, dtype=torch.int64, device=idx.device)
    return load.scatter_add_(0, idx.reshape(-1), counts.reshape(-1))


def update_bias(bias: Tensor, load: Tensor, rate: float, *, center: bool = False) -> Tensor:
    """Return b + γ·sign(mean load - load), Algorithm 1 of arXiv 2408.15664; called once per optimizer step.

    Args:
        bias: [..., E] float32 (1e-3 added to a bfloat16 bias is lost from 0.5 on).
        load: [..., E], as from `expert_load`, of the whole global batch.
        rate: γ.
        center: Subtract the mean of the update, which keeps the bias's mean (as torchtitan, not the paper).

    Raises:
        ConfigError: The bias is not float32.
    """
    if bias.dtype != torch.float32:
        raise ConfigError(f"e_score_correction_bias is {bias.dtype}: keep it in float32, small steps vanish")
    # load.sum() - E·load instead of mean - load: exact for integers, so a perfectly loaded expert stays.
    direction = torch.sign(load.sum(-1, keepdim=True) - load * load.shape[-1]).to(bias.dtype)
    if center:
        direction = direction - direction.mean(-1, keepdim=True)
    return bias + rate * direction


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load, [...] float64 of [..., E]; 0 where nothing was routed."""
    wide = load.to(torch.float64)
    mean = wide.mean(-1)
    return torch.where(mean > 0, (wide.amax(-1) - mean) / mean.clamp_min(MIN_GATE_SUM), 0.0)


def sequence_balance_loss(scores: Tensor, mask: Tensor | None = None, *, top_k: int) -> Tensor:
    """Complementary sequence-wise loss, eq. 17-20 of arXiv 2412.19437, without α.

    f_i counts the top K of the unbiased affinities without regard to groups; P_i is the mean of the
    affinities normalised over all experts.

    Args:
        scores: affinities [B, T, E].
        mask: [B, T]; T in the equations is then the number of tokens that count.
        top_k: K.

    Returns:
        The mean over all B rows of Σ f_i P_i, a scalar; a row without tokens adds 0.
    """
    share = scores / (scores.sum(-1, keepdim=True) + MIN_GATE_SUM)
    chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(top_k, dim=-1).indices, 1.0)
    if mask is None:
        length = scores.new_full((scores.shape[0], 1), scores.shape[1])
        counts, total = chosen.sum(1), share.sum(1)
    else:
        weight = mask.to(scores.dtype).unsqueeze(-1)
        length = weight.sum(1).clamp_min(1.0)
        counts, total = (chosen * weight).sum(1), (share * weight).sum(1)
    frequency = counts * (scores.shape[-1] / top_k) / length
    return (frequency * total / length).sum(-1).mean()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchRouting:
    """Counts of a layer's chosen experts over a global batch, from which balance losses take f.

    Attributes:
        load: [E] int64, tokens that chose each expert.
        visits: [D] int64, tokens that chose at least one expert of each device.
        n_rows: Rows of the global batch.
    """

    load: Tensor
    visits: Tensor
    n_rows: int


def device_visits(idx: Tensor, mask: Tensor | None = None, *, n_experts: int, n_devices: int) -> Tensor:
    """Number of tokens that chose at least one expert of each device: [D] int64, from idx [N, K], mask [N].

    Raises:
        ConfigError: `n_devices` does not divide E.
    """
    if n_devices < 1 or n_experts % n_devices:
        raise ConfigError(f"n_devices ({n_devices}) does not divide n_routed_experts ({n_experts})")
    visited = torch.zeros(idx.shape[0], n_devices, dtype=torch.int64, device=idx.device)
    visited.scatter_(1, idx.div(n_experts // n_devices, rounding_mode="floor"), 1)
    if mask is not None:
        visited *= mask.to(torch.bool).unsqueeze(-1)
    return visited.sum(0)


def auxiliary_loss(
    scores: Tensor, idx: Tensor, mask: Tensor | None = None, *, batch: BatchRouting | None = None
) -> Tensor:
    """The classic balance loss E · Σ f_i P_i (GShard, Switch; eq. 23-25 of arXiv 2405.04434), without α.

    Args:
        scores: affinities [N, E]; they are normalised per token, so sigmoid and softmax gates both fit.
        idx: [N, K] experts as routed.
        mask: [N].
        batch: Counts of the global batch that these tokens are a part of; None: they are all of it.

    Returns:
        A scalar, these tokens' part of the loss of the batch; that is 1 when the load is even, whatever the
        affinities.
    """
    load = expert_load(idx, scores.shape[-1], mask) if batch is None else batch.load
    frequency, share = _frequency_and_share(scores, load, mask, top_k=idx.shape[-1])
    return (frequency * share).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLosses:
    """DeepSeek-V2's three losses, each a scalar without its weight.

    Attributes:
        expert: Expert-level loss, for experts of even load (eq. 23-25).
        device: Device-level loss, for devices of even computation (eq. 26-28).
        communication: Communication loss, for devices that receive equal numbers of tokens (eq. 29-31).
    """

    expert: Tensor
    device: Tensor
    communication: Tensor


def device_losses(
    scores: Tensor,
    idx: Tensor,
    mask: Tensor | None = None,
    *,
    n_devices: int,
    max_devices: int,
    batch: BatchRouting | None = None,
) -> DeviceLosses:
    """Expert-, device- and communication-level balance losses, eq. 23-31 of arXiv 2405.04434.

    Args:
        scores: affinities [N, E], normalised per token here.
        idx: [N, K] experts as routed.
        mask: [N].
        n_devices: D; device i holds experts i·E/D … (i+1)·E/D.
        max_devices: M, how many devices a token may reach.
        batch: Counts of the global batch that these tokens are a part of; None: they are all of it.

    Returns:
        These tokens' part of the losses of the batch.

    Raises:
        ConfigError: `n_devices` does not divide E.
    """
    n_experts, top_k = scores.shape[-1], idx.shape[-1]
    if batch is None:
        visits = device_visits(idx, mask, n_experts=n_experts, n_devices=n_devices)
        batch = BatchRouting(load=expert_load(idx, n_experts, mask), visits=visits, n_rows=1)
    frequency, share = _frequency_and_share(scores, batch.load, mask, top_k=top_k)
    device_share = share.view(n_devices, -1).sum(1)
    device_frequency = frequency.view(n_devices, -1).mean(1)
    received = batch.visits.to(scores.dtype) * (n_devices / max_devices)
    received = received / _n_tokens(batch.load, top_k).to(scores.dtype)
    return DeviceLosses(
        expert=(frequency * share).sum(),
        device=(device_frequency * device_share).sum(),
        communication=(received * device_share).sum(),
    )


def _frequency_and_share(
    scores: Tensor, load: Tensor, mask: Tensor | None, *, top_k: int
) -> tuple[Tensor, Tensor]:
    """f_i of a global batch, and these tokens' part of its P_i, both [E], of eq. 24 and 25."""
    n_tokens = _n_tokens(load, top_k).to(scores.dtype)
    share = scores / (scores.sum(-1, keepdim=True) + MIN_GATE_SUM)
    if mask is not None:
        share = share * mask.to(scores.dtype).unsqueeze(-1)
    return load.to(scores.dtype) * (scores.shape[-1] / top_k) / n_tokens, share.sum(0) / n_tokens


def _n_tokens(load: Tensor, top_k: int) -> Tensor:
    """Number of tokens behind a load, at least 1."""
    return load.sum().div(top_k, rounding_mode="floor").clamp_min(1)


__all__ = [
    "BatchRouting",
    "DeviceLosses",
    "auxiliary_loss",
    "device_losses",
    "device_visits",
    "expert_load",
    "max_violation",
    "sequence_balance_loss",
    "update_bias",
]
