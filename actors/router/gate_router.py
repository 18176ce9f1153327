"""A router with the gates, for callers that have hidden states and no trunk.

Shapes: N tokens, D hidden, K experts per token, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from actors.router.router import Router
from errors import ProtocolError
from model.config import ModelConfig
from model.routing import affinity, gate_values, select_experts


class GateRouter:
    """Gates of all MoE layers, and a router to their experts.

    Args:
        config: The model.
        gates: Model layer index -> weight `[E, D]` and bias `[E]` (float32) of its gate.
        router: Calls wait for one of its lanes.
        lanes: Number of the router's lanes.
    """

    def __init__(
        self, config: ModelConfig, gates: Mapping[int, tuple[Tensor, Tensor]], router: Router, *, lanes: int
    ) -> None:
        self._config = config
        self._gates = dict(gates)
        self._router = router
        self._free = list(range(lanes))
        self._changed = threading.Condition()
        self._calls = 0

    @property
    def epoch(self) -> int:
        """The placement epoch in use."""
        return self._router.table.epoch

    @torch.no_grad()
    def route(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The routed experts' sum [N, D] for hidden [N, D], and the experts chosen [N, K].

        Raises:
            ProtocolError: The layer has no routed experts, or the hidden states have another width.
            ChannelError: A host cannot be reached.
        """
        if layer not in self._gates:
            raise ProtocolError(f"layer {layer} has no routed experts; these have: {sorted(self._gates)}")
        if hidden.ndim != 2 or hidden.shape[1] != self._config.hidden_size:
            raise ProtocolError(
                f"hidden states are [n, {self._config.hidden_size}], not {list(hidden.shape)}"
            )
        config = self._config
        weight, bias = self._gates[layer]
        scores = affinity(hidden, weight)
        idx = select_experts(
            scores,
            bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            group_score=config.group_score,
            group_experts=config.scored_experts,
        )
        gates = gate_values(scores, idx, normalize=config.norm_topk_prob, factor=config.routed_scaling_factor)
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            at = self._free.pop()
            self._calls += 1
            call = self._calls
        lane = self._router.lane(at)
        try:
            lane.begin(0, call)
            return lane.dispatch(layer, hidden, idx, gates).combine(), idx
        except BaseException:
            lane.abandon()
            raise
        finally:
            with self._changed:
                self._free.append(at)
                self._changed.notify()

    def close(self) -> None:
        """Close all channels."""
        self._router.close()


def gates_of(config: ModelConfig, trunk: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Weights and biases of the gates from a trunk's tensors (`WeightSource.trunk`)."""
    prefix = "model.layers.{}.mlp.gate.{}"
    return {
        layer: (
            trunk[prefix.format(layer, "weight")],
            trunk[prefix.format(layer, "e_score_correction_bias")].float(),
        )
        for layer in config.moe_layers
    }


__all__ = ["GateRouter", "gates_of"]
