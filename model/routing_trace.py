"""What one forward pass of one microbatch leaves behind about its routing."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Trace:
    """Routes and loads by layer; one object per microbatch, used by one thread.

    A layer whose route is present takes it and counts nothing: activation recompute so never routes
    otherwise than the first pass, and a load is never counted twice.

    Attributes:
        routes: chosen experts [N, K] int64.
        loads: tokens per expert [E] int64, padding left out.
    """

    routes: dict[int, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)


__all__ = ["Trace"]
