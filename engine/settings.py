"""Settings of an engine: the size of its cache, its batches, its drafts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Capacity of an engine, and how it uses it.

    Attributes:
        cache_tokens: Positions of the KV cache, over all sequences.
        page_size: Positions of a page.
        max_batch_tokens: Positions computed in a step, at most.
        max_sequences: Sequences that run at the same time, at most.
        prefix_caching: Whether prompts with a common beginning share pages.
        drafts: Number of MTP modules used for drafts; None uses all, 0 none.
        pace_drafts: Whether drafts are made only where they increase throughput, see `engine.pacing`.
        overlap_from: Positions from which a step is computed in two halves, one half computing while the
            other waits for its experts; None never.
    """

    cache_tokens: int = 32768
    page_size: int = 16
    max_batch_tokens: int = 512
    max_sequences: int = 64
    prefix_caching: bool = True
    drafts: int | None = None
    pace_drafts: bool = True
    overlap_from: int | None = None

    @property
    def n_pages(self) -> int:
        """Number of pages of the cache."""
        return max(1, self.cache_tokens // self.page_size)

    def longest(self, positions: int) -> int:
        """Tokens of prompt and output together, at most, for a model with this many positions."""
        return min(positions, self.n_pages * self.page_size)


__all__ = ["EngineSettings"]
