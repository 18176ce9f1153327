"""Memory of payloads that is reused: new memory costs more to touch than a copy into it."""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
import torch

from channels.framing.buffers import OwnedBuffer, tensor_at
from channels.framing.header import TensorSpan

_LEAST: Final = 1 << 16


class Scratch:
    """Pieces of memory for payloads, which come back when no tensor is a view of them.

    Args:
        spare: Number of pieces to keep for the next payloads.
    """

    def __init__(self, spare: int) -> None:
        self._spare: deque[torch.Tensor] = deque(maxlen=spare)

    def take(self, size: int) -> torch.Tensor:
        """A piece of at least `size` bytes, [n] uint8."""
        for _ in range(len(self._spare)):
            memory = self._spare.popleft()
            if memory.nbytes >= size:
                return memory
        with torch.inference_mode(False):  # it may be reused outside of inference mode
            return torch.empty(rounded(size), dtype=torch.uint8)

    def give(self, memory: torch.Tensor) -> None:
        """Take a piece back. Any thread, within a finalizer too: takes no lock."""
        self._spare.append(memory)

    def lend(self, memory: torch.Tensor, where: TensorSpan) -> torch.Tensor:
        """The tensor that lies in a piece, which comes back when nothing is a view of it any more."""
        loan = ScratchLoan(self, memory)
        return tensor_at(np.asarray(loan), memory.data_ptr(), where)


class ScratchLoan(OwnedBuffer):
    """A piece of `Scratch` that tensors are views of; given back when it is collected."""

    __slots__ = ("_memory", "_scratch")

    def __init__(self, scratch: Scratch, memory: torch.Tensor) -> None:
        super().__init__(memory, memory.data_ptr(), memory.nbytes)
        self._scratch, self._memory = scratch, memory

    def __del__(self) -> None:
        self._scratch.give(self._memory)


def rounded(size: int) -> int:
    """The least power of two not below `size`, so that payloads of similar sizes share memory."""
    return max(_LEAST, 1 << (size - 1).bit_length())


__all__ = ["Scratch", "rounded"]
