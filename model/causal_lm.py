"""A whole model in one module: trunk and routed experts in this process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.experts.local import LocalExperts
from model.transformer import Transformer
from model.weight_source import WeightSource


class CausalLM(nn.Module):
    """Trunk and all routed experts in this process.

    Attributes:
        trunk: the `Transformer`.
        experts: its `LocalExperts`.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.trunk = Transformer(config, dtype=dtype)
        self.experts = LocalExperts(
            config.moe_layers,
            n_experts=config.n_routed_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            dtype=dtype,
            std=config.initializer_range,
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map tokens [B, T] to logits [B, T, V] in float32, or float64 of a float64 model."""
        logits: Tensor = self.trunk(input_ids, experts=self.experts)
        return logits

    @torch.no_grad()
    def load(self, source: WeightSource) -> None:
        """Load all weights from a source."""
        self.trunk.load_state_dict(source.trunk())
        for layer in self.config.moe_layers:
            w13, w2 = self.experts.weights(layer)
            for expert in range(self.config.n_routed_experts):
                first, second = source.expert(layer, expert)
                w13[expert].copy_(first)
                w2[expert].copy_(second)


__all__ = ["CausalLM"]
