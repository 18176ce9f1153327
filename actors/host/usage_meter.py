"""What an expert host did since it began: requests, rows, seconds, and rows for each expert."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.host.expert_layers import Layer
from channels.base import Phase
from kernels.dispatch import count_pairs
from model.config import ModelConfig


class Meter:
    """Counters that several threads add to.

    Attributes:
        in_flight: requests being handled now.
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
        """A request has come."""
        with self._lock:
            self.in_flight += 1

    def end(self) -> None:
        """It has been answered or refused."""
        with self._lock:
            self.in_flight -= 1

    def forward(
        self,
        phase: Phase,
        rows: int,
        seconds: float,
        index: int,
        layer: Layer,
        local: npt.NDArray[np.integer[Any]],
    ) -> None:
        """A forward pass has been computed.

        Args:
            index: the model's layer.
            local: [nnz], its pairs' experts as indices into the layer's shard.
        """
        with self._lock:
            self._requests[phase] += 1
            self._rows += rows
            self._busy += seconds
            count_pairs(local, layer.ids, self._of_layer[index])

    def backward(self, rows: int, seconds: float) -> None:
        """A backward pass has been computed."""
        with self._lock:
            self._requests[Phase.BACKWARD] += 1
            self._rows += rows
            self._busy += seconds

    def read(self) -> tuple[dict[str, int], int, float]:
        """Requests by phase, rows, and seconds of computing, summed over threads."""
        with self._lock:
            requests = {phase.name: self._requests[phase] for phase in Phase if self._requests[phase]}
            return requests, self._rows, self._busy

    def loads(self) -> Tensor:
        """[L, E] int64, pairs computed, rows in the order of `ModelConfig.moe_layers`."""
        with self._lock:
            return torch.from_numpy(self._loads.copy())


__all__ = ["Meter"]
