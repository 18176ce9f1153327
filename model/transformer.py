"""The trunk: everything of the model but its routed experts, under Hugging Face's parameter names.

Shapes: B rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import document_mask
from model.balance_loss import BalanceWeights
from model.block import Block, Pass
from model.config import ModelConfig
from model.experts.protocols import Experts
from model.moe import Gate
from model.mtp import MTPModule
from model.norm import RMSNorm
from model.rope import rotation
from model.routing_trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """Hidden states after the trunk's blocks.

    Attributes:
        last: [B, T, D] before the final norm.
        normed: [B, T, D] after the final norm, the input of the head and the first MTP module.
        balance: Sum of the layers' weighted balance losses, each a mean over the rows; None without them.
    """

    last: Tensor
    normed: Tensor
    balance: Tensor | None


class Trunk(nn.Module):
    """Embedding, blocks and final norm; MTP module k is `layers[num_hidden_layers + k]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.layers.extend(MTPModule(config, layer) for layer in config.mtp_layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(nn.Module):
    """A DeepSeek-V3-style language model that is given its routed experts at every call.

    Args:
        config: Shape of the model.
        dtype: Type of the parameters, torch's default when None; the gates' biases are always float32.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        if dtype is not None:
            self.to(dtype)
        self.reset_parameters()

    def tie(self) -> None:
        """Share embedding and head if the configuration says so; call it again after `to_empty`."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw matrices from N(0, initializer_range), set norms to one and biases to zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range)
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def set_bias(self, bias: Tensor) -> None:
        """Set the gates' biases [L, E] float32, rows in the order of `ModelConfig.moe_layers`."""
        for row, gate in zip(bias, self._gates(), strict=True):
            gate.e_score_correction_bias.copy_(row)

    @torch.no_grad()
    def bias(self) -> Tensor:
        """The gates' biases [L, E] float32, rows in the order of `ModelConfig.moe_layers`."""
        return torch.stack([gate.e_score_correction_bias for gate in self._gates()])

    def _gates(self) -> list[Gate]:
        return [module for module in self.modules() if isinstance(module, Gate)]

    def forward(
        self,
        tokens: Tensor,
        *,
        experts: Experts,
        segments: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Map tokens [B, T] to the main model's logits [B, T, V] in float32, or float64 of a float64 model.

        Args:
            segments: [B, T] int32 index of each token's document, -1 for padding; attention stays
                within a document. None: each row is one document, the fast path.
            trace: Records routes and loads.
        """
        hidden = self.hidden_states(tokens, experts=experts, segments=segments, trace=trace)
        return self.logits(hidden.normed)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map normed hidden states [..., D] to logits [..., V] of at least float32, by the shared head."""
        logits = F.linear(hidden, self.lm_head.weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def start(
        self,
        tokens: Tensor,
        *,
        experts: Experts,
        segments: Tensor | None = None,
        trace: Trace | None = None,
        balance: BalanceWeights | None = None,
        recompute: bool = False,
    ) -> Pass:
        """Build the inputs that all blocks share for tokens [B, T]."""
        weight = self.model.embed_tokens.weight
        return Pass(
            experts=experts,
            trace=Trace() if trace is None else trace,
            rotation=rotation(self.config, tokens.shape[1], dtype=weight.dtype, device=weight.device),
            mask=None if segments is None else document_mask(segments, weight.dtype),
            counted=None if segments is None else segments >= 0,
            balance=balance,
            recompute=recompute,
        )

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        experts: Experts,
        segments: Tensor | None = None,
        trace: Trace | None = None,
        balance: BalanceWeights | None = None,
        recompute: bool = False,
    ) -> Hidden:
        """Run the main model's blocks on tokens [B, T]."""
        through = self.start(
            tokens,
            experts=experts,
            segments=segments,
            trace=trace,
            balance=balance,
            recompute=recompute,
        )
        return self.run(tokens, through)

    def run(self, tokens: Tensor, through: Pass) -> Hidden:
        """Run the main model's blocks on tokens [B, T], with the inputs from `start`."""
        x = self.model.embed_tokens(tokens)
        total: Tensor | None = None
        for block in self.model.layers[: self.config.num_hidden_layers]:
            x, loss = block(x, through)
            if loss is not None:
                total = loss if total is None else total + loss
        return Hidden(last=x, normed=self.model.norm(x), balance=total)


__all__ = ["Hidden", "Transformer", "Trunk"]
