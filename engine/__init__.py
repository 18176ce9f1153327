"""Generation without Ray: continuous batching over a paged latent KV cache, with speculative decoding.

The way of a token: `service` runs `engine` in a thread; a step of it goes through `scheduler`, `runner` and
`acceptance`; `text` decodes the new tokens and finds where the text ends.
"""

from __future__ import annotations

from engine.acceptance import EngineStats
from engine.engine import Engine, NewTokens
from engine.params import SamplingParams
from engine.sequence import Sequence, TokenLogprobs
from engine.settings import EngineSettings
from engine.weights import TrunkWeights

__all__ = [
    "Engine",
    "EngineSettings",
    "EngineStats",
    "NewTokens",
    "SamplingParams",
    "Sequence",
    "TokenLogprobs",
    "TrunkWeights",
]
