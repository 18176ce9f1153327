"""The protocol of whatever gives the weights of a model: random numbers, or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class WeightSource(Protocol):
    """Gives the weights of a model, in whatever parts its pieces ask for."""

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """w13 [2I, D] and w2 [D, I] of one routed expert."""
        ...

    def trunk(self) -> dict[str, Tensor]:
        """Everything else, by parameter or buffer name; what `Transformer.load_state_dict` takes."""
        ...

    def trunk_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same one after the other, for who has no room for all; a tied head is the embedding alone."""
        ...


__all__ = ["WeightSource"]
