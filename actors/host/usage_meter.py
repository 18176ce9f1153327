"""Counters of an expert host since its start: requests, rows, seconds, and pairs for each expert."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.host.expert_layers import ExpertLayer
from channels.base import Phase
from kernels.dispatch import count_pairs
from model.config import ModelConfig


class UsageMeter:
    """Counters that several threads update.

    Args:
        config: The model.

    Attributes:
        in_flight: Number of requests being handled now.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._lock = threading.Lock()
        self._requests = [0] * len(Phase)
        self._loads = np.zeros((len(config.moe_layers), config.n_routed_experts), np.int64)
        self._of_layer = dict(zip(config.moe_layers, self._loads, strict=True))  # views
        self._rows = 0
        self._busy = 0.0
        self.in_flight = 0

    def begin(self) -> None:
        """Count the arrival of a request."""
        with self._lock:
            self.in_flight += 1

    def end(self) -> None:
        """Count the end of a request, answered or refused."""
        with self._lock:
            self.in_flight -= 1

    def forward(
        self,
        phase: Phase,
        rows: int,
        seconds: float,
        index: int,
        layer: ExpertLayer,
        local: npt.NDArray[np.integer[Any]],
    ) -> None:
        """Count a forward pass.

        Args:
            phase: INFER or FORWARD.
            rows: Number of rows.
            seconds: Time of the computation.
            index: Model layer index.
            layer: The layer's experts.
            local: [nnz], experts of the pairs as indices into the layer's shard.
        """
        with self._lock:
            self._requests[phase] += 1
            self._rows += rows
            self._busy += seconds
            count_pairs(local, layer.ids, self._of_layer[index])

    def backward(self, rows: int, seconds: float) -> None:
        """Count a backward pass."""
        with self._lock:
            self._requests[Phase.BACKWARD] += 1
            self._rows += rows
            self._busy += seconds

    def read(self) -> tuple[dict[str, int], int, float]:
        """Requests by phase, rows, and seconds of computation summed over threads."""
        with self._lock:
            requests = {phase.name: self._requests[phase] for phase in Phase if self._requests[phase]}
            return requests, self._rows, self._busy

    def loads(self) -> Tensor:
        """Token-expert pairs computed: [L, E] int64, rows in the order of `ModelConfig.moe_layers`."""
        with self._lock:
            return torch.from_numpy(self._loads.copy())


__all__ = ["UsageMeter"]
