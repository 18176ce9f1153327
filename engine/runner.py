"""The trunk's forward pass over the positions of a step, with the latent KV cache.

Shapes: N positions, D hidden, H heads, C kv_lora_rank, R rotary dimensions, W = C + R width of a cache's row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import Batch, PairedBatch, SequenceGroup, Stretch, by_length, collect, halved, on_device
from engine.few_rows import FewRowsBatch, FewRowsRunner
from engine.sampling import likeliest
from engine.weights import LayerWeights, ModuleWeights, TrunkWeights
from kernels.constants import FEW_ROWS, LATENT_NORM_EPS
from model.experts.protocols import Experts, PairedExperts, Pending
from model.rope import rotation
from model.routing import affinity, gate_values, select_experts


@dataclass(frozen=True, slots=True)
class States:
    """Results of a step of the trunk.

    Attributes:
        hidden: [N, D], hidden states after the last layer.
        normed: [N, D], hidden states after the final norm.
        logits: [n, V], logits of the positions requested, at least float32.
    """

    hidden: Tensor
    normed: Tensor
    logits: Tensor


class Runner:
    """Computes hidden states and logits, and owns the memory of the KV cache.

    Args:
        weights: The trunk.
        experts: The routed experts.
        n_pages: Number of pages of the cache.
        page_size: Positions of a page.
        overlap_from: Positions from which a step is computed in two halves, one half computing while the
            other waits for its experts; None never. Experts in this process are never waited for.
    """

    def __init__(
        self,
        weights: TrunkWeights,
        experts: Experts,
        *,
        n_pages: int,
        page_size: int,
        overlap_from: int | None = None,
    ) -> None:
        self._page_size, self._overlap_from = page_size, overlap_from
        config = weights.config
        self._latent, self._heads = config.kv_lora_rank, config.num_attention_heads
        self._eps = config.rms_norm_eps
        like = weights.embedding
        width = config.kv_lora_rank + config.qk_rope_head_dim
        n_layers = len(weights.layers) + len(weights.modules)
        # Zeroed, so that the memory is mapped now and does not grow with use.
        self._cache = torch.empty(n_layers, n_pages * page_size, width, dtype=like.dtype, device=like.device)
        self._cache.zero_()
        angles = rotation(config, config.max_position_embeddings, dtype=like.dtype, device=like.device)
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._turns = torch.complex(angles.cos.to(wide), angles.sin.to(wide))
        self.replace(weights, experts)

    @property
    def weights(self) -> TrunkWeights:
        """The trunk in use."""
        return self._weights

    def replace(self, weights: TrunkWeights, experts: Experts) -> None:
        """Change to other weights of the same shape; the entries of the cache are invalid after that."""
        self._weights, self._experts = weights, experts
        self._pair = experts.pair if isinstance(experts, PairedExperts) else None
        self._few: FewRowsRunner | None = None
        if FewRowsRunner.takes(weights, self._page_size):
            turns = self._turns
            self._few = FewRowsRunner(weights, experts, self._cache, turns.real, turns.imag, self._page_size)

    def batch(self, stretches: Sequence[Stretch]) -> Batch | PairedBatch | FewRowsBatch:
        """The batch of a step of the trunk over these stretches."""
        rows = sum(map(by_length, stretches))
        if self._few is not None and rows <= FEW_ROWS:
            return self._few.batch(stretches)
        if self._pair is None or self._overlap_from is None or rows < max(2, self._overlap_from):
            return self._collect(stretches)
        first, second = halved(stretches)
        return PairedBatch(
            halves=(self._collect(first), self._collect(second)),
            ends=tuple(accumulate(map(by_length, stretches))),
        )

    def draft_batch(self, stretches: Sequence[Stretch]) -> Batch | FewRowsBatch:
        """The batch of an MTP module's pass over these stretches."""
        return self._collect(stretches) if self._few is None else self._few.batch(stretches)

    def _collect(self, stretches: Sequence[Stretch]) -> Batch:
        return collect(
            stretches, page_size=self._page_size, turns=self._turns, dtype=self._weights.embedding.dtype
        )

    def compute(self, batch: Batch | PairedBatch | FewRowsBatch, rows: Sequence[int]) -> States:
        """Compute a step of the trunk.

        Args:
            batch: The positions.
            rows: Rows of the batch whose logits are needed, in rising order.
        """
        if isinstance(batch, PairedBatch):
            return self._compute_paired(batch, rows)
        if isinstance(batch, FewRowsBatch):
            assert self._few is not None
            hidden = self._few.forward(batch)
        else:
            hidden = self._forward(batch)
        normed = self._normed(hidden)
        return States(hidden, normed, self.logits(_picked(normed, rows)))

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> Tensor:
        x = F.embedding(batch.tokens, self._weights.embedding)
        for at, layer in enumerate(self._weights.layers):
            x = self._block(x, layer, self._cache[at], batch)
        return x

    @torch.inference_mode()
    def _compute_paired(self, batch: PairedBatch, rows: Sequence[int]) -> States:
        assert self._pair is not None
        ways = list(zip(batch.halves, self._pair, strict=True))
        x = [F.embedding(half.tokens, self._weights.embedding) for half in batch.halves]
        away: list[Pending | None] = [None, None]
        for at, layer in enumerate(self._weights.layers):
            for i, (half, experts) in enumerate(ways):
                back = away[i]
                if back is not None:
                    x[i] = x[i].add_(back.combine())
                x[i], away[i] = self._begin_block(x[i], layer, self._cache[at], half, experts)
        cut = bisect_left(rows, len(x[0]))
        wanted = rows[:cut], [row - len(x[0]) for row in rows[cut:]]
        dtype = torch.promote_types(x[0].dtype, torch.float32)
        logits = x[0].new_empty(len(rows), len(self._weights.head), dtype=dtype)
        normed: list[Tensor] = []
        for i, (back, out) in enumerate(zip(away, (logits[:cut], logits[cut:]), strict=True)):
            if back is not None:
                x[i] = x[i].add_(back.combine())
            # The head of the first half is computed while the second half waits for its experts.
            normed.append(self._norm(x[i], self._weights.norm))
            self._project(_picked(normed[i], wanted[i]), out)
        return States(torch.cat(x), torch.cat(normed), logits)

    def _project(self, normed: Tensor, out: Tensor) -> None:
        """Write the logits of normed states to `out`."""
        head = self._weights.head.t()
        if out.dtype == head.dtype:
            torch.mm(normed, head, out=out)
        else:
            out.copy_(normed @ head)

    def _normed(self, hidden: Tensor) -> Tensor:
        if self._few is not None and hidden.shape[0] <= FEW_ROWS:
            return self._few.normed(hidden)
        with torch.inference_mode():
            return self._norm(hidden, self._weights.norm)

    def draft(self, depth: int, batch: Batch | FewRowsBatch, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Compute MTP module `depth` (1 is the first) over a batch.

        Args:
            depth: Number of the module.
            batch: The positions; its tokens are shifted by `depth` in `chain` mode.
            hidden: [N, D]: in `chain` mode the normed states of the module before (of the trunk for the first
                module), in `parallel` mode the trunk's states before the norm.
            rows: Rows whose states are needed, in order; for other rows only cache entries are computed.

        Returns:
            Normed states of these rows, which the head takes.
        """
        if isinstance(batch, FewRowsBatch):
            assert self._few is not None
            return self._few.draft(depth, batch, hidden, rows)
        return self._draft(depth, batch, hidden, rows)

    @torch.inference_mode()
    def _draft(self, depth: int, batch: Batch, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        module: ModuleWeights = self._weights.modules[depth - 1]
        x = hidden
        if module.join is not None:
            assert module.embedding_norm is not None and module.hidden_norm is not None
            embedded = self._norm(F.embedding(batch.tokens, self._weights.embedding), module.embedding_norm)
            x = F.linear(torch.cat((embedded, self._norm(hidden, module.hidden_norm)), dim=-1), module.join)
        at = len(self._weights.layers) + depth - 1
        x = self._block(x, module.layer, self._cache[at], batch)
        return self._norm(x if len(rows) == len(x) else x[list(rows)], module.norm)

    def draft_tokens(self, normed: Tensor) -> list[int]:
        """The likeliest tokens after normed states [N, D] of a module, possibly with rounded weights."""
        if self._few is not None:
            return self._few.draft_tokens(normed)
        return likeliest(self.logits(normed))

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [N, V] of normed states [N, D], at least float32."""
        if self._few is not None and 0 < normed.shape[0] <= FEW_ROWS:
            return self._few.logits(normed)
        with torch.inference_mode():
            logits = F.linear(normed, self._weights.head)
            return logits if logits.dtype == torch.float64 else logits.float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return _rms_norm(x, weight, self._eps)

    def _block(self, x: Tensor, layer: LayerWeights, cache: Tensor, batch: Batch) -> Tensor:
        x, away = self._begin_block(x, layer, cache, batch, self._experts)
        return x if away is None else x.add_(away.combine())

    def _begin_block(
        self, x: Tensor, layer: LayerWeights, cache: Tensor, batch: Batch, experts: Experts
    ) -> tuple[Tensor, Pending | None]:
        """Compute a block without its routed experts, whose outputs are pending."""
        x = x + self._attend(self._norm(x, layer.attention_norm), layer, cache, batch)
        normed = self._norm(x, layer.mlp_norm)
        if layer.routed is None:
            assert layer.mlp is not None
            return x.add_(layer.mlp(normed)), None
        config, routed = self._weights.config, layer.routed
        scores = affinity(normed, routed.weight)
        idx = select_experts(
            scores,
            routed.bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            group_score=config.group_score,
            group_experts=config.scored_experts,
        )
        gates = gate_values(scores, idx, normalize=config.norm_topk_prob, factor=config.routed_scaling_factor)
        away = experts.dispatch(layer.index, normed, idx, gates)
        return x.add_(routed.shared(normed)), away

    def _attend(self, x: Tensor, layer: LayerWeights, cache: Tensor, batch: Batch) -> Tensor:
        weights, latent, heads = layer.attention, self._latent, self._heads
        down = F.linear(x, weights.down)
        if weights.query_norm is None:
            query = F.linear(x, weights.query)
        else:
            rank = weights.query_norm.shape[0]
            query = F.linear(_rms_norm(down[:, :rank], weights.query_norm, LATENT_NORM_EPS), weights.query)
            down = down[:, rank:]
        query = query.view(x.shape[0], heads, -1)
        if weights.w_uk is not None:
            nope = weights.w_uk.shape[1]
            plain = torch.bmm(query[..., :nope].transpose(0, 1), weights.w_uk).transpose(0, 1)
            query = torch.cat((plain, query[..., nope:]), dim=2)
        _turn_(query[..., latent:], batch.turns)
        entry = torch.cat(
            (_rms_norm(down[:, :latent], weights.latent_norm, LATENT_NORM_EPS), down[:, latent:]), dim=1
        )
        _turn_(entry[:, None, latent:], batch.turns)
        cache.index_copy_(0, batch.slots, entry)
        seen = [self._attend_group(query[group.rows], cache, group) for group in batch.groups]
        out = seen[0] if len(seen) == 1 else torch.cat(seen)
        if weights.w_uv is not None:
            out = torch.bmm(out.transpose(0, 1), weights.w_uv).transpose(0, 1)
        return F.linear(out.flatten(1), weights.out)

    def _attend_group(self, query: Tensor, cache: Tensor, group: SequenceGroup) -> Tensor:
        """Attention of one group: queries [b·n, H, W] to latent outputs [b·n, H, C]."""
        b, heads = group.sequences, self._heads
        keys = cache.index_select(0, group.slots).view(b, -1, cache.shape[1])
        weights = torch.bmm(query.reshape(b, -1, query.shape[2]), keys.transpose(1, 2))
        if group.mask is not None:
            weights.view(b, -1, heads, keys.shape[1]).add_(group.mask)
        weights = torch.softmax(weights, dim=-1)
        return torch.bmm(weights, keys[..., : self._latent]).view(-1, heads, self._latent)


def _picked(states: Tensor, rows: Sequence[int]) -> Tensor:
    if not rows or len(rows) == len(states):
        return states[: len(rows)]
    return states[on_device(states.device, list(rows))]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [N, D] in few operations; torch's own takes a dozen on a CPU."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    size = weight.shape[0]
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().add_(eps * size).rsqrt_()
    out: Tensor = (wide * scale.mul_(size**0.5)).to(x.dtype).mul_(weight)
    return out


def _turn_(x: Tensor, turns: Tensor) -> None:
    """Rotate neighbouring pairs of x [N, heads, R] by turns [N, 1, R / 2], in place."""
    aligned = not (x.storage_offset() | x.stride(0) | x.stride(1)) & 1
    in_place = aligned and x.dtype in (torch.float32, torch.float64)
    pairs = x if in_place else x.to(turns.real.dtype, copy=True, memory_format=torch.contiguous_format)
    turned = torch.view_as_complex(pairs.view(*x.shape[:2], -1, 2)).mul_(turns)
    if not in_place:
        x.copy_(torch.view_as_real(turned).flatten(-2))


__all__ = ["Runner", "States"]
