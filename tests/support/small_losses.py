"""Losses and gradients of a small float64 model with MTP modules, on random tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.balance_loss import BalanceWeights
from model.causal_lm import CausalLM
from model.config import ModelConfig
from model.losses.training_losses import Losses, LossWeights, training_loss
from model.routing_trace import Trace
from support.small_config import SMALL

NO_BALANCE = BalanceWeights()


def model_of(**changes: Any) -> CausalLM:
    """A small float64 model with large weights, so that outputs and routes vary."""
    torch.manual_seed(0)
    fields = {**SMALL, "initializer_range": 0.3, "num_nextn_predict_layers": 2, **changes}
    return CausalLM(ModelConfig.model_validate(fields), dtype=torch.float64)


def tokens_of(*shape: int) -> Tensor:
    """Random tokens, the same ones for the same shape."""
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(5))


def loss_of(model: CausalLM, tokens: Tensor, segments: Tensor | None = None, **changes: Any) -> Losses:
    """Losses of a batch; `changes` are fields of `LossWeights` and arguments of `training_loss`."""
    fields: dict[str, Any] = {"n_targets": 1, "n_rows": 1, "balance": NO_BALANCE, "mtp": 0.3}
    given: dict[str, Any] = {"trace": Trace(), **changes}
    weights = LossWeights(**{name: given.pop(name, field) for name, field in fields.items()})
    return training_loss(model.trunk, tokens, segments, experts=model.experts, weights=weights, **given)


def gradients(model: CausalLM, losses: Losses) -> dict[str, Tensor]:
    """Gradients of the total loss by the parameter's name."""
    model.zero_grad()
    losses.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


__all__ = ["NO_BALANCE", "gradients", "loss_of", "model_of", "tokens_of"]
