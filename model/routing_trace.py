"""Routes and loads that the forward pass of one microbatch records."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Trace:
    """Routes and loads by layer; one object per microbatch, used by one thread.

    A layer whose route is present takes that route and counts nothing. So activation recompute routes as the
    first pass did, and no load is counted twice.

    Attributes:
        routes: Chosen experts [N, K] int64 of each layer.
        loads: Tokens per expert [E] int64 of each layer, without padding.
    """

    routes: dict[int, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)


__all__ = ["Trace"]
