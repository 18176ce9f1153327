"""The weighted balance loss of a MoE layer, and its weights at an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from model.balance import BatchRouting, auxiliary_loss, device_losses, sequence_balance_loss
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

    @property
    def of_batch(self) -> bool:
        """Whether some loss depends on the routing of the whole global batch (see `model.balance`)."""
        device = (self.device.expert, self.device.device, self.device.communication)
        return (self.strategy == "auxiliary" and self.auxiliary > 0) or (
            self.strategy == "device" and any(weight > 0 for weight in device)
        )

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
    scores: Tensor,
    idx: Tensor,
    mask: Tensor | None,
    *,
    weights: BalanceWeights,
    config: ModelConfig,
    batch: BatchRouting | None = None,
) -> Tensor | None:
    """Weighted balance loss of one MoE layer, a mean over the rows; None if no loss has a weight.

    Args:
        scores: affinities [B, T, E].
        idx: chosen experts [B·T, K].
        mask: [B, T], false on padding; None counts every position.
        batch: Counts of the global batch that the rows are a part of; None: they are all of it.

    Returns:
        A scalar; the mean over all microbatches, weighted by their rows, is the loss of the global batch.
    """
    if not (weights.sequence > 0 or weights.of_batch):
        return None
    n_experts = scores.shape[-1]
    flat = scores.view(-1, n_experts)
    flat_mask = None if mask is None else mask.flatten()
    # A part of the loss of n_rows rows, as a mean over the B rows here.
    scale = 1.0 if batch is None else batch.n_rows / scores.shape[0]
    terms: list[Tensor] = []
    if weights.sequence > 0:
        alone = sequence_balance_loss(scores, mask, top_k=config.num_experts_per_tok)
        terms.append(weights.sequence * alone)
    if weights.of_batch and weights.strategy == "auxiliary":
        terms.append(scale * weights.auxiliary * auxiliary_loss(flat, idx, flat_mask, batch=batch))
    if weights.of_batch and weights.strategy == "device":
        losses = device_losses(
            flat, idx, flat_mask, n_devices=config.n_group, max_devices=config.topk_group, batch=batch
        )
        terms.append(scale * weights.device.expert * losses.expert)
        terms.append(scale * weights.device.device * losses.device)
        terms.append(scale * weights.device.communication * losses.communication)
    return sum(terms[1:], terms[0])


__all__ = ["BalanceWeights", "layer_balance_loss"]
