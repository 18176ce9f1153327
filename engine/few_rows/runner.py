"""The trunk's forward pass over a step of few positions, on compiled functions, as in decoding.

The pass computes the same function as the tensor operations of `engine.runner`, to rounding, and uses the
same cache. It is used for steps of `FEW_ROWS` positions or fewer, beyond which products of torch are faster,
with float32 or float64 weights in CPU memory.

Shapes: N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.batch import Stretch
from engine.few_rows.assistant import Assistant
from engine.few_rows.batch import FewRowsBatch, collect_few
from engine.few_rows.layers import Array, FewRowsLayer, FewRowsModule, Fields, as_array, as_rounded
from engine.weights import TrunkWeights
from kernels.attention import LatentCache, attend, remember
from kernels.constants import FEW_ROWS
from kernels.drafting import join, likeliest
from kernels.experts import mix_experts, swiglu
from kernels.linear import project
from kernels.norm import rms_norm
from kernels.routing import route
from kernels.team import Desk
from model.experts.protocols import ArrayExperts, Experts


class FewRowsRunner:
    """Computes hidden states of few positions, as `engine.runner.Runner` does of many.

    Args:
        weights: The trunk; float32 or float64, in CPU memory.
        experts: The routed experts.
        cache: [layers, slots, W], the cache of the `Runner`.
        cos: [positions, R / 2], rotary rotations of all positions.
        sin: [positions, R / 2].
        page_size: Positions of a page, a multiple of four.
    """

    def __init__(
        self, weights: TrunkWeights, experts: Experts, cache: Tensor, cos: Tensor, sin: Tensor, page_size: int
    ) -> None:
        config = weights.config
        self._experts = experts
        self._arrays = experts if isinstance(experts, ArrayExperts) else None
        self._page_size = page_size
        self._eps = config.rms_norm_eps
        self._embedding, self._head = as_array(weights.embedding), as_array(weights.head)
        self._norm_weight = as_array(weights.norm)
        self._draft_head = as_rounded(weights.head) if weights.modules else None
        self._layers = [FewRowsLayer.of(layer, config) for layer in weights.layers]
        self._modules = [
            FewRowsModule(
                layer=FewRowsLayer.rounded(module.layer, config, experts),
                norm=as_array(module.norm),
                embedding_norm=None if module.embedding_norm is None else as_array(module.embedding_norm),
                hidden_norm=None if module.hidden_norm is None else as_array(module.hidden_norm),
                join=None if module.join is None else as_rounded(module.join),
            )
            for module in weights.modules
        ]
        caches = cache.numpy()
        self._cache: Fields = tuple(
            LatentCache(caches, cos.contiguous().numpy(), sin.contiguous().numpy(), page_size)
        )
        desk = Desk.of(
            rows=FEW_ROWS,
            heads=config.num_attention_heads,
            width=cache.shape[2],
            latent=config.kv_lora_rank,
            pages=-(-config.max_position_embeddings // page_size),
            dtype=caches.dtype,
        )
        self._desk: Fields = tuple(desk)
        self._assistant = Assistant(desk, caches, page_size) if torch.get_num_threads() > 1 else None
        self._top_k = config.num_experts_per_tok

    @staticmethod
    def takes(weights: TrunkWeights, page_size: int) -> bool:
        """Whether compiled functions exist for weights of this type and device."""
        like = weights.embedding
        return (
            like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64) and page_size % 4 == 0
        )

    @staticmethod
    def is_compiled() -> bool:
        """Whether compiled code is stored, so that the first step does not take seconds to compile."""
        return any(Path(attend.stats.cache_path).glob("attention.attend-*"))

    def batch(self, stretches: Sequence[Stretch]) -> FewRowsBatch:
        """The batch of a step over these stretches."""
        return collect_few(stretches, page_size=self._page_size)

    def forward(self, batch: FewRowsBatch) -> Tensor:
        """Hidden states [N, D] after the last layer, before the final norm."""
        x = self._embedding[batch.tokens]
        for at, layer in enumerate(self._layers):
            self._block(x, layer, at, batch)
        return torch.from_numpy(x)

    def draft(self, depth: int, batch: FewRowsBatch, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Normed states of rows after an MTP module; `engine.runner.Runner.draft` describes the arguments."""
        module, at = self._modules[depth - 1], len(self._layers) + depth - 1
        states = hidden.numpy()
        x = np.empty_like(states)
        if module.join is None:
            x[:] = states
        else:
            tokens = np.array(batch.tokens)
            join(
                tokens,
                self._embedding,
                module.embedding_norm,
                states,
                module.hidden_norm,
                module.join,
                self._eps,
                x,
            )
        if len(rows) < len(x) or len(x) > FEW_ROWS:
            remember(x, module.layer.attention, at, self._cache, batch.places)
            x = x[rows]
        for start in range(0, len(rows), FEW_ROWS):
            part = rows[start : start + FEW_ROWS]
            some = batch if len(part) == len(batch.tokens) else batch.select(part)
            self._block(x[start : start + FEW_ROWS], module.layer, at, some)
        return torch.from_numpy(self._norm(x, module.norm))

    def draft_tokens(self, normed: Tensor) -> list[int]:
        """The likeliest tokens after normed states [N, D] of a module, with the head rounded to 8 bits."""
        assert self._draft_head is not None
        out = np.empty(normed.shape[0], np.int64)
        likeliest(normed.numpy(), self._draft_head, out)
        tokens: list[int] = out.tolist()
        return tokens

    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] after the final norm."""
        return torch.from_numpy(self._norm(hidden.numpy(), self._norm_weight))

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [N, V] of normed states [N, D]."""
        out = np.empty((normed.shape[0], self._head.shape[0]), self._head.dtype)
        project(normed.contiguous().numpy(), self._head, out)
        return torch.from_numpy(out)

    def _norm(self, x: Array, weight: Array) -> Array:
        out = np.empty_like(x)
        rms_norm(x, weight, self._eps, out)
        return out

    def _block(self, x: Array, layer: FewRowsLayer, at: int, batch: FewRowsBatch) -> None:
        shared = batch.long and self._assistant is not None and self._assistant.ready()
        attend(x, layer.attention, at, self._cache, batch.places, self._desk, shared, x)
        normed = self._norm(x, layer.mlp_norm)
        if layer.gate is None:
            swiglu(normed, layer.gate_up, layer.down, x)
            return
        idx = np.empty((x.shape[0], self._top_k), np.int64)
        gates = np.empty(idx.shape, x.dtype)
        route(normed, layer.gate, idx, gates)
        arrays = None
        if layer.experts is not None:
            mix_experts(
                normed,
                np.arange(0, idx.size + 1, idx.shape[1]),
                idx.ravel(),
                gates.ravel(),
                *layer.experts,
                x,
            )
            swiglu(normed, layer.gate_up, layer.down, x)
            return
        if self._arrays is not None:
            arrays = self._arrays.dispatch_arrays(layer.index, normed, idx, gates)
        if arrays is None:
            tensors = torch.from_numpy(normed), torch.from_numpy(idx), torch.from_numpy(gates)
            pending = self._experts.dispatch(layer.index, *tensors)
        swiglu(normed, layer.gate_up, layer.down, x)
        if arrays is None:
            x += pending.combine().numpy()
        else:
            arrays.add_to(x)


__all__ = ["FewRowsRunner"]
