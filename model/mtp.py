"""Multi-token prediction: modules that predict further tokens from the trunk's hidden states.

Module k (1-based) at position i predicts token i + k + 1. `chain` is DeepSeek-V3's (arXiv 2412.19437,
eq. 21-25): module k takes module k - 1's hidden state and the embedding of token i + k. `parallel` is
Gloeckle et al.'s (arXiv 2404.19737): each module is a block on the trunk's last hidden state. Embedding
and head are the main model's.

Shapes: B rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.block import Block, Pass
from model.config import ModelConfig
from model.norm import RMSNorm


class SharedHead(nn.Module):
    """The norm before the shared head (Hugging Face: `shared_head.norm`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MTPModule(Block):
    """A block that predicts a further token; in `chain` mode it joins the next token's embedding first."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        if config.mtp_mode == "chain":
            self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Join a hidden state and a later token's embedding, both [B, T, D], into the block's input (eq. 21).

        The released weights expect the embedding first; the paper writes the hidden state first.
        """
        joined: Tensor = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return joined

    def draft(
        self, hidden: Tensor, through: Pass, embedded: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map hidden states [B, T, D] to [B, T, D] normed for the head (eq. 22), and return the balance loss.

        Args:
            embedded: [B, T, D], joined with the hidden states; None where the block takes them as they are.
        """
        x = hidden if embedded is None else self.join(hidden, embedded)
        # Without the hooks of a call: a sharded module's parameters are whole throughout `draft`.
        out, loss = self.forward(x, through)
        return self.shared_head.norm(out), loss


def draft_acceptance(
    main: Tensor, draft: Tensor, *, depth: int, valid: Tensor | None = None
) -> tuple[int, int]:
    """Count the positions where a module's greedy token is the main model's greedy token.

    Teacher-forced: both have read the true tokens up to their position.

    Args:
        main: [B, T] greedy tokens of the main model; position i predicts token i + 1.
        draft: [B, T] greedy tokens of module `depth`; position i predicts token i + depth + 1.
        depth: k, 1 for the first module.
        valid: [B, T], false where a draft is not to be evaluated (`model.losses.training_losses.targets_of`).

    Returns:
        Number of accepted drafts, and of evaluated ones.
    """
    length = max(0, main.shape[1] - depth)
    equal = draft[:, :length] == main[:, depth:]
    if valid is None:
        return int(equal.sum()), equal.numel()
    judged = valid[:, :length]
    return int((equal & judged).sum()), int(judged.sum())


__all__ = ["MTPModule", "SharedHead", "draft_acceptance"]
