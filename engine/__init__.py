"""Generation without Ray: continuous batching over a paged latent cache, with speculative decoding."""

from __future__ import annotations

from engine.engine import Engine, EngineSettings, EngineStats, Progress
from engine.params import SamplingParams
from engine.sequence import Sequence, TokenLogprobs
from engine.weights import TrunkWeights

__all__ = [
    "Engine",
    "EngineSettings",
    "EngineStats",
    "Progress",
    "SamplingParams",
    "Sequence",
    "TokenLogprobs",
    "TrunkWeights",
]
