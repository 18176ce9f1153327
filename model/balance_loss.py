"""The weighted balance loss of a MoE layer, and its weights at an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from model.balance import auxiliary_loss, device_losses, sequence_balance_loss
from model.config import BalanceConfig, DeviceWeights, ModelConfig
from model.optimizers.schedule import value_at


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceWeights:
    """The weights of the balance losses at one optimizer step; the default adds none.

    Attributes:
        strategy: Strategy of `BalanceConfig`; `bias` and `none` add no loss.
        sequence: α of the sequence-wise loss, which is added under any strategy.
        auxiliary: Weight of the classic loss under `auxiliary`.
        device: Weights of DeepSeek-V2's losses under `device`.
    """

    strategy: Literal["bias", "auxiliary", "device", "none"] = "none"
    sequence: float = 0.0
    auxiliary: float = 0.0
    device: DeviceWeights = field(default_factory=DeviceWeights)

    @classmethod
    def at(cls, balance: BalanceConfig, step: int) -> BalanceWeights:
        """Return the weights at an optimizer step."""
        return cls(
            strategy=balance.strategy,
            sequence=value_at(balance.sequence_weight, step),
            auxiliary=value_at(balance.auxiliary_weight, step),
            device=balance.device_weights,
        )


def layer_balance_loss(
    scores: Tensor, idx: Tensor, mask: Tensor | None, *, weights: BalanceWeights, config: ModelConfig
) -> Tensor | None:
    """Weighted balance loss of one MoE layer, a mean over the rows; None if no loss has a weight.

    Args:
        scores: affinities [B, T, E].
        idx: chosen experts [B·T, K].
        mask: [B, T], false on padding; None counts every position.
    """
    n_experts = scores.shape[-1]
    flat = scores.view(-1, n_experts)
    flat_mask = None if mask is None else mask.flatten()
    terms: list[Tensor] = []
    if weights.sequence > 0:
        alone = sequence_balance_loss(scores, mask, top_k=config.num_experts_per_tok)
        terms.append(weights.sequence * alone)
    if weights.strategy == "auxiliary" and weights.auxiliary > 0:
        terms.append(weights.auxiliary * auxiliary_loss(flat, idx, flat_mask))
    if weights.strategy == "device":
        losses = device_losses(flat, idx, flat_mask, n_devices=config.n_group, max_devices=config.topk_group)
        terms.append(weights.device.expert * losses.expert)
        terms.append(weights.device.device * losses.device)
        terms.append(weights.device.communication * losses.communication)
    return sum(terms[1:], terms[0]) if terms else None


__all__ = ["BalanceWeights", "layer_balance_loss"]
