"""Agreement of all workers, before an all-reduce, that no worker has lost a host."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.trunk.parameters import Reducer
from errors import Interrupted, RaymoeError


class WorkersAgreement:
    """One worker's side of the agreement.

    Args:
        rank: Rank of this worker, from 0.
        workers: Number of workers.
        reducer: Sums over the workers.
        together: Whether passes take all workers, as `TrunkParameters.together` says.

    Attributes:
        workers: Number of workers.
        attempt: Current attempt of the run.
    """

    def __init__(self, *, rank: int, workers: int, reducer: Reducer, together: bool) -> None:
        self.rank, self.workers = rank, workers
        self.attempt = 0
        self._reducer, self._together = reducer, together

    def meet(self) -> None:
        """Agree before an operation that takes all workers; does nothing where each works alone.

        Raises:
            Interrupted: Another worker has given up the step, or the run is in a newer attempt.
        """
        if self._together:
            self.agree()

    def agree(self, loss: RaymoeError | None = None) -> None:
        """Wait for all workers, and learn whether one of them has lost a part of the step.

        All workers are in the same attempt when this returns, since gradients of different attempts must not
        be summed.

        Args:
            loss: The error for which this worker has given up the step.

        Raises:
            RaymoeError: The loss.
            Interrupted: Another worker has given up the step, or the run is in a newer attempt.
        """
        while True:
            said = torch.zeros(self.workers, 2, dtype=torch.int64)
            said[self.rank] = torch.tensor([self.attempt, loss is not None])
            self._reducer.all_reduce([said])
            if loss is not None:
                raise loss
            newest = int(said[:, 0].max())
            if self.attempt < newest or (said[:, 1].any() and bool((said[:, 0] == newest).all())):
                raise Interrupted("another worker has lost an expert host")
            if bool((said[:, 0] == newest).all()):
                return

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the workers, after they have agreed."""
        self._reducer.all_reduce([tensor])


__all__ = ["WorkersAgreement"]
