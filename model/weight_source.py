"""The protocol of a source of a model's weights, which random numbers and checkpoints implement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class WeightSource(Protocol):
    """Weights of a model, expert by expert and tensor by tensor."""

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Return w13 [2I, D] and w2 [D, I] of one routed expert."""
        ...

    def trunk(self) -> dict[str, Tensor]:
        """Return the trunk's tensors by name, as `Transformer.load_state_dict` takes them."""
        ...

    def trunk_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trunk's tensors one after the other, without a tied head."""
        ...


__all__ = ["WeightSource"]
