"""The trunk's forward pass over a step of few positions, on compiled functions: what decoding lives on.

The same function as `engine.runner`'s tensor operations, to rounding, and on the same cache. A step of
`MOST_ROWS` positions or fewer comes here where weights are float32 or float64 in the machine's own memory.

Shapes: N positions, D hidden, V vocabulary, S sequences, P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.assistant import Assistant
from engine.batch import Stretch
from engine.weights import Layer, Mixed, Routed, TrunkWeights
from kernels.attention import AttentionWeights, LatentCache, Matrix, RowPlaces, attend, remember
from kernels.constants import FEW_ROWS
from kernels.drafting import join, likeliest
from kernels.experts import mix_experts, swiglu
from kernels.linear import project
from kernels.norm import rms_norm
from kernels.rounded import Rounded
from kernels.routing import GateWeights, route
from kernels.team import Desk
from model.config import ModelConfig
from model.experts.local import LocalExperts
from model.experts.protocols import ArrayExperts, Experts

MOST_ROWS = FEW_ROWS
"""Beyond, matrix products of many rows at a time are faster."""

_LONG = 384  # positions that all rows see together

Array = npt.NDArray[Any]
Fields = tuple[Any, ...]
"""A NamedTuple of `kernels` as a plain tuple, whose type Numba finds faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewBatch:
    """One step's positions.

    Attributes:
        tokens: that are there.
        places: a `RowPlaces` of the positions; pages of the table that none of them sees are 0.
        ends: row after the last one of each stretch, in the order of the stretches.
        long: whether so much of the cache is looked at that it pays to share the work.
    """

    tokens: list[int]
    places: Fields
    ends: tuple[int, ...]
    long: bool

    def of(self, rows: Sequence[int]) -> FewBatch:
        """Some positions alone; where stretches end is not told."""
        at = list(rows)
        position, slot, sequence, table = self.places
        return FewBatch(
            tokens=[self.tokens[row] for row in at],
            places=tuple(RowPlaces(position[at], slot[at], sequence[at], table)),
            ends=(),
            long=self.long,
        )


def collect_few(stretches: Sequence[Stretch], *, page_size: int) -> FewBatch:
    """Lay stretches out, in the order given."""
    tokens: list[int] = []
    rows: list[tuple[int, int, int]] = []
    ends: list[int] = []
    width = max(-(-stretch.end // page_size) for stretch in stretches)
    table = np.zeros((len(stretches), width), np.int64)
    for at, stretch in enumerate(stretches):
        tokens += stretch.tokens
        pages = stretch.pages
        used = -(-stretch.end // page_size)
        table[at, :used] = pages[:used]
        for position in range(stretch.start, stretch.end):
            rows.append((position, pages[position // page_size] * page_size + position % page_size, at))
        ends.append(len(tokens))
    position, slot, sequence = np.ascontiguousarray(np.array(rows, np.int64).T)
    return FewBatch(
        tokens=tokens,
        places=tuple(RowPlaces(position, slot, sequence, table)),
        ends=tuple(ends),
        long=sum(row[0] for row in rows) >= _LONG,
    )


class FewRows:
    """Computes hidden states of few positions.

    Args:
        weights: the trunk; float32 or float64, in the machine's memory.
        experts: the routed experts.
        cache: [layers, slots, W], the Runner's; entries are written and read.
        cos, sin: [positions, R / 2].
        page_size: positions of a page, a multiple of four.
    """

    def __init__(
        self, weights: TrunkWeights, experts: Experts, cache: Tensor, cos: Tensor, sin: Tensor, page_size: int
    ) -> None:
        config = weights.config
        self._experts = experts
        self._arrays = experts if isinstance(experts, ArrayExperts) else None
        self._page_size = page_size
        self._eps = config.rms_norm_eps
        self._embedding, self._head = _array(weights.embedding), _array(weights.head)
        self._norm_weight = _array(weights.norm)
        self._draft_head = _rounded(weights.head) if weights.modules else None
        self._layers = [_Layer.of(layer, config) for layer in weights.layers]
        self._modules = [
            _Module(
                layer=_Layer.rounded(module.layer, config, experts),
                norm=_array(module.norm),
                embedding_norm=None if module.embedding_norm is None else _array(module.embedding_norm),
                hidden_norm=None if module.hidden_norm is None else _array(module.hidden_norm),
                join=None if module.join is None else _rounded(module.join),
            )
            for module in weights.modules
        ]
        caches = cache.numpy()
        self._cache: Fields = tuple(
            LatentCache(caches, cos.contiguous().numpy(), sin.contiguous().numpy(), page_size)
        )
        desk = Desk.of(
            rows=MOST_ROWS,
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
        """Whether these weights can be computed with here."""
        like = weights.embedding
        return (
            like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64) and page_size % 4 == 0
        )

    def batch(self, stretches: Sequence[Stretch]) -> FewBatch:
        """What a step over these stretches needs."""
        return collect_few(stretches, page_size=self._page_size)

    def forward(self, batch: FewBatch) -> Tensor:
        """Hidden states [N, D] after the last layer, before the final norm."""
        x = self._embedding[batch.tokens]
        for at, layer in enumerate(self._layers):
            self._block(x, layer, at, batch)
        return torch.from_numpy(x)

    def draft(self, depth: int, batch: FewBatch, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """See `engine.runner.Runner.draft`."""
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
        if len(rows) < len(x) or len(x) > MOST_ROWS:
            remember(x, module.layer.attention, at, self._cache, batch.places)
            x = x[rows]
        for start in range(0, len(rows), MOST_ROWS):
            part = rows[start : start + MOST_ROWS]
            some = batch if len(part) == len(batch.tokens) else batch.of(part)
            self._block(x[start : start + MOST_ROWS], module.layer, at, some)
        return torch.from_numpy(self._norm(x, module.norm))

    def draft_tokens(self, normed: Tensor) -> list[int]:
        """See `engine.runner.Runner.draft_tokens`."""
        assert self._draft_head is not None
        out = np.empty(normed.shape[0], np.int64)
        likeliest(normed.numpy(), self._draft_head, out)
        tokens: list[int] = out.tolist()
        return tokens

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm: [N, D] to [N, D]."""
        return torch.from_numpy(self._norm(hidden.numpy(), self._norm_weight))

    def logits(self, normed: Tensor) -> Tensor:
        """[N, D] to [N, V]."""
        out = np.empty((normed.shape[0], self._head.shape[0]), self._head.dtype)
        project(normed.contiguous().numpy(), self._head, out)
        return torch.from_numpy(out)

    def _norm(self, x: Array, weight: Array) -> Array:
        out = np.empty_like(x)
        rms_norm(x, weight, self._eps, out)
        return out

    def _block(self, x: Array, layer: _Layer, at: int, batch: FewBatch) -> None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A block; in a dense one `gate` is None, and its network lies where the shared expert's does.

    Attributes:
        attention: an `AttentionWeights`.
        gate: a `GateWeights`.
        experts: w13 and w2 of the routed experts, where these are not to be asked.
    """

    index: int
    attention: Fields
    mlp_norm: Array
    gate: Fields | None
    gate_up: Matrix
    down: Matrix
    experts: tuple[Rounded, Rounded] | None

    @classmethod
    def of(cls, layer: Layer, config: ModelConfig) -> _Layer:
        """The block with its weights as they are."""
        return cls._of(layer, config, _array, None)

    @classmethod
    def rounded(cls, layer: Layer, config: ModelConfig, experts: Experts) -> _Layer:
        """The block in 8 bits, its routed experts too if they are in this process."""
        routed = None
        if layer.routed is not None and isinstance(experts, LocalExperts):
            w13, w2 = experts.weights(layer.index)
            routed = _rounded(w13), _rounded(w2)
        return cls._of(layer, config, _rounded, routed)

    @classmethod
    def _of(
        cls,
        layer: Layer,
        config: ModelConfig,
        matrix: Callable[[Tensor], Matrix],
        experts: tuple[Rounded, Rounded] | None,
    ) -> _Layer:
        routed = layer.routed
        mixed: Mixed | None = layer.mlp if routed is None else routed.shared
        assert mixed is not None
        return cls(
            index=layer.index,
            attention=_attention(layer, config, matrix),
            mlp_norm=_array(layer.mlp_norm),
            gate=None if routed is None else _gate(routed, config),
            gate_up=matrix(mixed.gate_up),
            down=matrix(mixed.down),
            experts=experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """An MTP module; what joins state and embedding is None in `parallel` mode."""

    layer: _Layer
    norm: Array
    embedding_norm: Array | None
    hidden_norm: Array | None
    join: Rounded | None


def _attention(layer: Layer, config: ModelConfig, matrix: Callable[[Tensor], Matrix]) -> Fields:
    weights = layer.attention
    none = weights.down.new_empty(0, 0, 0)
    fields = AttentionWeights(
        norm=_array(layer.attention_norm),
        down=matrix(weights.down),
        query_norm=_array(none.flatten() if weights.query_norm is None else weights.query_norm),
        query=matrix(weights.query),
        up_key=_array(none if weights.w_uk is None else weights.w_uk),
        latent_norm=_array(weights.latent_norm),
        up_value=_array(none if weights.w_uv is None else weights.w_uv),
        output=matrix(weights.out),
        eps=config.rms_norm_eps,
        heads=config.num_attention_heads,
    )
    return tuple(fields)


def _gate(routed: Routed, config: ModelConfig) -> Fields:
    fields = GateWeights(
        centroids=_array(routed.weight),
        bias=_array(routed.bias),
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        by_bias=config.group_score == "biased",
        normalize=config.norm_topk_prob,
        factor=config.routed_scaling_factor,
    )
    return tuple(fields)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().contiguous().numpy()
    return array


def _rounded(tensor: Tensor) -> Rounded:
    return Rounded.of(_array(tensor))


__all__ = ["MOST_ROWS", "FewBatch", "FewRows", "collect_few"]
