"""Draws the new tokens of each sequence from a step's logits, and verifies drafts.

V is the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.sampling import adjusted, choose, likeliest_if_finite, log_probabilities, not_finite
from engine.scheduler import Share
from engine.sequence import Sequence, TokenLogprobs


@dataclass(slots=True)
class EngineStats:
    """Counters of an engine.

    Attributes:
        steps: Steps computed.
        proposed: Position among the drafts of a step -> drafts verified.
        accepted: Position among the drafts of a step -> drafts that were right.
    """

    steps: int = 0
    proposed: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Appends new tokens to sequences.

    Attributes:
        vocabulary: Number of tokens of the tokenizer.
        longest: Tokens of prompt and output of a sequence together, at most.
        stats: Counts drafts.
    """

    vocabulary: int
    longest: int
    stats: EngineStats

    def split(self, counts: list[int], logits: Tensor) -> list[tuple[Tensor, list[int | None]]]:
        """The logits [n, V] of each share, and their likeliest tokens, None where logits are not finite."""
        logits = logits[:, : self.vocabulary]
        if not len(logits):
            return [(logits, [])] * len(counts)
        best = iter(likeliest_if_finite(logits))
        if len(counts) == 1:
            return [(logits, list(best))]
        return [
            (part, [next(best) for _ in range(count)])
            for part, count in zip(torch.split(logits, counts), counts, strict=True)
        ]

    def accept(self, share: Share, logits: Tensor, greedy: list[int | None]) -> list[int]:
        """Draw the next token of a sequence, and one more for each draft that equals the token drawn.

        Args:
            logits: [n, V], of the positions that `needed_logits` names for this share.
            greedy: [n], the likeliest tokens, as `split` gives them.

        Raises:
            DataError: The logits are not finite.
        """
        sequence = share.sequence
        params = sequence.params
        if sequence.wants_prompt and share.start < len(sequence.prompt):
            _note_prompt(share, logits)
            logits, greedy = logits[-1 - share.drafts :], greedy[-1 - share.drafts :]
        if not share.samples:
            return []
        if not params.max_tokens:
            sequence.finish_reason = "length"
            return []
        drafts = sequence.drafts[: share.drafts]
        plain = params.greedy and not params.adjusts_logits and params.logprobs is None
        new: list[int] = []
        for at in range(len(drafts) + 1):
            token = greedy[at]
            if token is None:
                raise not_finite()
            if not plain:
                row = adjusted(logits[at], params, sequence.prompt, sequence.output, sequence.ends)
                token = choose(row, params, sequence.rng.random())
                if params.logprobs is not None:
                    own, best = log_probabilities(logits[at], token, params.logprobs)
                    sequence.logprobs.append(TokenLogprobs(token=own, best=best))
            sequence.output.append(token)
            new.append(token)
            self.set_finish_reason(sequence, token)
            if at < len(drafts):
                self.stats.proposed[at] += 1
                self.stats.accepted[at] += drafts[at] == token
            if sequence.finish_reason is not None or at == len(drafts) or drafts[at] != token:
                break
        sequence.drafts.clear()
        return new

    def set_finish_reason(self, sequence: Sequence, token: int) -> None:
        """Set `finish_reason` if the sequence ends with this token, its last one."""
        params, n_new = sequence.params, len(sequence.output)
        if token in sequence.ends and n_new > params.min_tokens:
            sequence.finish_reason = "stop"
        elif n_new >= params.max_tokens or len(sequence) >= self.longest:
            sequence.finish_reason = "length"


def needed_logits(shares: Items[Share], ends: Items[int]) -> tuple[list[int], list[int]]:
    """The positions whose logits are needed: how many of each share, and their rows of the batch.

    These are the last certain position of a share that samples, its drafts, and the whole prompt where its
    log probabilities are requested.

    Args:
        ends: Row after the last one of each share.
    """
    counts: list[int] = []
    rows: list[int] = []
    for share, end in zip(shares, ends, strict=True):
        count = 1 + share.drafts if share.samples else 0
        if share.sequence.wants_prompt and share.start < len(share.sequence.prompt):
            count = share.end - share.start
        counts.append(count)
        rows += range(end - count, end)
    return counts, rows


def _note_prompt(share: Share, logits: Tensor) -> None:
    """Keep the log probabilities of the prompt's tokens in a share."""
    sequence = share.sequence
    for row, at in zip(logits, range(share.start + 1, len(sequence.prompt)), strict=False):
        if at > len(sequence.prompt_logprobs):  # a preempted prompt is computed twice
            own, best = log_probabilities(row, sequence.prompt[at], sequence.params.logprobs or 0)
            sequence.prompt_logprobs.append(TokenLogprobs(token=own, best=best))


__all__ = ["Acceptance", "EngineStats", "needed_logits"]
