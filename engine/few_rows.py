"""The trunk's forward pass over a step of few positions, on compiled functions: what decoding lives on.

The same function as `engine.runner`'s tensor operations, to rounding, and on the same cache. A step of
`MOST_ROWS` positions or fewer comes here where weights are float32 or float64 in the machine's own memory.

Shapes: N positions, D hidden, V vocabulary, S sequences, P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.assistant import Assistant
from engine.batch import Stretch
from engine.weights import LatentProjections, Layer, Mixed, TrunkWeights
from kernels import decode
from kernels.rounded import Rounded
from kernels.team import Desk
from model.experts import ArrayExperts, Experts, LocalExperts

MOST_ROWS = 16
"""Beyond, matrix products of many rows at a time are faster."""

_LONG = 384  # positions that all rows see together

Array = npt.NDArray[Any]
Matrix = npt.NDArray[Any] | Rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class FewBatch:
    """One step's positions.

    Attributes:
        tokens: that are there.
        position: [N] int64, which each sees its sequence up to.
        slot: [N] int64 of the cache, where its entry goes.
        sequence: [N] int64, row of the table.
        table: [S, P] int64, pages of each sequence; those that none of its positions sees are 0.
        ends: row after the last one of each stretch, in the order of the stretches.
        long: whether so much of the cache is looked at that it pays to share the work.
    """

    tokens: list[int]
    position: Array
    slot: Array
    sequence: Array
    table: Array
    ends: tuple[int, ...]
    long: bool

    def of(self, rows: Sequence[int]) -> FewBatch:
        """Some positions alone; where stretches end is not told."""
        at = list(rows)
        return FewBatch(
            tokens=[self.tokens[row] for row in at],
            position=self.position[at],
            slot=self.slot[at],
            sequence=self.sequence[at],
            table=self.table,
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
        position=position,
        slot=slot,
        sequence=sequence,
        table=table,
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
        self._heads = config.num_attention_heads
        self._cos, self._sin = cos.contiguous().numpy(), sin.contiguous().numpy()
        self._embedding, self._head = _array(weights.embedding), _array(weights.head)
        self._norm_weight = _array(weights.norm)
        self._draft_head = _rounded(weights.head) if weights.modules else None
        self._layers = [_Layer.of(layer) for layer in weights.layers]
        self._modules = [
            _Module(
                layer=_Layer.rounded(module.layer, experts),
                norm=_array(module.norm),
                embedding_norm=None if module.embedding_norm is None else _array(module.embedding_norm),
                hidden_norm=None if module.hidden_norm is None else _array(module.hidden_norm),
                join=None if module.join is None else _rounded(module.join),
            )
            for module in weights.modules
        ]
        self._caches = cache.numpy()
        self._desk = Desk.of(
            rows=MOST_ROWS,
            heads=self._heads,
            width=cache.shape[2],
            latent=config.kv_lora_rank,
            pages=-(-config.max_position_embeddings // page_size),
            dtype=self._caches.dtype,
        )
        self._assistant = (
            Assistant(self._desk, self._caches, page_size) if torch.get_num_threads() > 1 else None
        )
        self._routing = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.group_score == "biased",
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )

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
            decode.join(
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
            self._remember(x, module.layer.attention, at, batch)
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
        decode.likeliest(normed.numpy(), self._draft_head, out)
        tokens: list[int] = out.tolist()
        return tokens

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm: [N, D] to [N, D]."""
        return torch.from_numpy(self._norm(hidden.numpy(), self._norm_weight))

    def logits(self, normed: Tensor) -> Tensor:
        """[N, D] to [N, V]."""
        out = np.empty((normed.shape[0], self._head.shape[0]), self._head.dtype)
        decode.project(normed.contiguous().numpy(), self._head, out)
        return torch.from_numpy(out)

    def _norm(self, x: Array, weight: Array) -> Array:
        out = np.empty_like(x)
        decode.rms_norm(x, weight, self._eps, out)
        return out

    def _remember(self, x: Array, weights: _Attention, at: int, batch: FewBatch) -> None:
        decode.remember(
            x,
            weights.norm,
            weights.down,
            len(weights.query_norm),
            weights.latent_norm,
            self._eps,
            self._caches[at],
            self._cos,
            self._sin,
            batch.position,
            batch.slot,
        )

    def _block(self, x: Array, layer: _Layer, at: int, batch: FewBatch) -> None:
        shared = batch.long and self._assistant is not None and self._assistant.ready()
        decode.attend(
            x,
            *layer.attention,
            self._eps,
            self._heads,
            at,
            self._caches,
            self._page_size,
            self._cos,
            self._sin,
            batch.position,
            batch.slot,
            batch.sequence,
            batch.table,
            self._desk,
            shared,
            x,
        )
        normed = self._norm(x, layer.mlp_norm)
        if layer.gate is None:
            decode.swiglu(normed, layer.gate_up, layer.down, x)
            return
        idx = np.empty((x.shape[0], self._routing[0]), np.int64)
        gates = np.empty(idx.shape, x.dtype)
        decode.route(normed, layer.gate, layer.bias, *self._routing, idx, gates)
        arrays = None
        if layer.experts is not None:
            decode.mix_experts(
                normed,
                np.arange(0, idx.size + 1, idx.shape[1]),
                idx.ravel(),
                gates.ravel(),
                *layer.experts,
                x,
            )
            decode.swiglu(normed, layer.gate_up, layer.down, x)
            return
        if self._arrays is not None:
            arrays = self._arrays.dispatch_arrays(layer.index, normed, idx, gates)
        if arrays is None:
            tensors = torch.from_numpy(normed), torch.from_numpy(idx), torch.from_numpy(gates)
            pending = self._experts.dispatch(layer.index, *tensors)
        decode.swiglu(normed, layer.gate_up, layer.down, x)
        if arrays is None:
            x += pending.combine().numpy()
        else:
            arrays.add_to(x)


class _Attention(NamedTuple):
    """In the order in which `kernels.decode.attend` takes them."""

    norm: Array
    down: Matrix
    query_norm: Array
    query: Matrix
    up_key: Array
    latent_norm: Array
    up_value: Array
    back: Matrix

    @classmethod
    def of(cls, norm: Tensor, weights: LatentProjections, matrix: Callable[[Tensor], Matrix]) -> _Attention:
        none = weights.down.new_empty(0, 0, 0)
        return cls(
            norm=_array(norm),
            down=matrix(weights.down),
            query_norm=_array(none.flatten() if weights.query_norm is None else weights.query_norm),
            query=matrix(weights.query),
            up_key=_array(none if weights.w_uk is None else weights.w_uk),
            latent_norm=_array(weights.latent_norm),
            up_value=_array(none if weights.w_uv is None else weights.w_uv),
            back=matrix(weights.out),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A block; `gate` and `bias` are None in a dense one, whose network is where the shared expert's is.

    Attributes:
        experts: w13 and w2 of the routed ones, where these are not to be asked.
    """

    index: int
    attention: _Attention
    mlp_norm: Array
    gate: Array | None
    bias: Array | None
    gate_up: Matrix
    down: Matrix
    experts: tuple[Rounded, Rounded] | None

    @classmethod
    def of(cls, layer: Layer) -> _Layer:
        """As it is."""
        return cls._of(layer, _array, None)

    @classmethod
    def rounded(cls, layer: Layer, experts: Experts) -> _Layer:
        """In 8 bits, its routed experts too if they are in this process."""
        routed = None
        if layer.routed is not None and isinstance(experts, LocalExperts):
            w13, w2 = experts.weights(layer.index)
            routed = _rounded(w13), _rounded(w2)
        return cls._of(layer, _rounded, routed)

    @classmethod
    def _of(
        cls, layer: Layer, matrix: Callable[[Tensor], Matrix], experts: tuple[Rounded, Rounded] | None
    ) -> _Layer:
        routed = layer.routed
        mixed: Mixed | None = layer.mlp if routed is None else routed.shared
        assert mixed is not None
        return cls(
            index=layer.index,
            attention=_Attention.of(layer.attention_norm, layer.attention, matrix),
            mlp_norm=_array(layer.mlp_norm),
            gate=None if routed is None else _array(routed.weight),
            bias=None if routed is None else _array(routed.bias),
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


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().contiguous().numpy()
    return array


def _rounded(tensor: Tensor) -> Rounded:
    return Rounded.of(_array(tensor))


__all__ = ["MOST_ROWS", "FewBatch", "FewRows", "collect_few"]
