"""The engine: sequences in, tokens out, one step at a time.

A step makes one pass through the trunk over all sequences that run, with one call to the experts per layer,
then one through each MTP module. One thread uses an engine at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import Stretch
from engine.drafter import Advance, Drafter
from engine.pacing import DraftPacer
from engine.pages import PagePool
from engine.params import SamplingParams, check_tokens
from engine.runner import Runner
from engine.sampling import adjusted, choose, likeliest, log_probabilities
from engine.scheduler import Scheduler, Share
from engine.sequence import Sequence, TokenLogprobs
from engine.weights import TrunkWeights
from errors import ConfigError
from model.experts.protocols import Experts

_WARM_UP = 6  # tokens, some with drafts


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Room for sequences, and what to do with it.

    Attributes:
        cache_tokens: positions that the cache holds, over all sequences.
        page_size: positions of a page.
        max_batch_tokens: positions computed in a step.
        max_sequences: sequences that run at a time.
        prefix_caching: whether prompts that begin alike share pages.
        drafts: MTP modules to draft with; None takes all there are, 0 none.
        pace_drafts: draft only where it pays, see `engine.pacing`.
        overlap_from: positions of a step from which one half computes while the experts of the other work;
            None never.
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
        """Of the cache."""
        return max(1, self.cache_tokens // self.page_size)

    def longest(self, positions: int) -> int:
        """Tokens that prompt and output of a request may have together, of a model that takes so many."""
        return min(positions, self.n_pages * self.page_size)


@dataclass(slots=True)
class EngineStats:
    """What went through; only ever grows.

    Attributes:
        proposed, accepted: drafts by their position, judged and right.
    """

    steps: int = 0
    proposed: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step brought one sequence: new tokens, and its end in `sequence.finish_reason`."""

    sequence: Sequence
    tokens: list[int]


class Engine:
    """Generates for many requests at once.

    Args:
        weights: the trunk.
        experts: the routed experts.
        settings: room and habits.
        end_of_text: tokens that end a text.
        vocabulary: tokens that there are; the model may have more rows.
        on_step: is told the number of each step before it begins.
        clock: seconds.
    """

    def __init__(
        self,
        weights: TrunkWeights,
        experts: Experts,
        settings: EngineSettings | None = None,
        *,
        end_of_text: Items[int] = (),
        vocabulary: int | None = None,
        on_step: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        settings = settings or EngineSettings()
        self.settings = settings
        self._on_step = on_step
        self._end_of_text = frozenset(end_of_text)
        self._vocabulary = vocabulary or weights.config.vocab_size
        n_pages = settings.n_pages
        self.pool = PagePool(n_pages, settings.page_size, caching=settings.prefix_caching)
        self.scheduler = Scheduler(
            self.pool, max_batch_tokens=settings.max_batch_tokens, max_sequences=settings.max_sequences
        )
        self._runner = Runner(
            weights,
            experts,
            n_pages=n_pages,
            page_size=settings.page_size,
            overlap_from=settings.overlap_from,
        )
        there = len(weights.modules)
        depth = there if settings.drafts is None else min(settings.drafts, there)
        self._drafter = Drafter(self._runner, depth, weights.config.mtp_mode == "chain") if depth else None
        self.pacer = DraftPacer() if depth and settings.pace_drafts else None
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self.stats = EngineStats()

    @property
    def longest(self) -> int:
        """Tokens that prompt and output of a request may have together."""
        return self.settings.longest(self._runner.weights.config.max_position_embeddings)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences)

    def add(self, id: str, prompt: Items[int], params: SamplingParams, output: Items[int] = ()) -> Sequence:
        """Take a request.

        Args:
            output: tokens that another engine has generated for it: it goes on as if they were this one's.

        Raises:
            ConfigError: an empty prompt, one that leaves no room for a token, an unknown token, an id that
                is in use, an output that has come to its end.
        """
        if id in self._sequences:
            raise ConfigError(f"request {id!r} is running already; choose another id")
        if not prompt:
            raise ConfigError("prompt is empty; give one token at least")
        if len(prompt) >= self.longest:
            raise ConfigError(
                f"prompt has {len(prompt)} tokens, which leaves no room within the {self.longest} that the"
                " model and its cache take; shorten it"
            )
        check_tokens(self._vocabulary, prompt, params, output)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._end_of_text)}
        sequence = Sequence(
            id=id, prompt=list(prompt), params=params, ends=frozenset(ends), output=list(output)
        )
        if output:
            self._check_end(sequence, output[-1])
        if sequence.finish_reason is not None:
            raise ConfigError(
                f"output has come to its end ({sequence.finish_reason}) with {len(output)} tokens; there is "
                "nothing to go on with"
            )
        self._sequences[id] = sequence
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, id: str) -> None:
        """Drop a request; its pages are free at once. An unknown one is none any more."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, "abort")

    def finish(self, id: str, reason: str) -> None:
        """End a request whose text has ended by what the engine does not see, such as a stop string."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, reason)

    def warm_up(self) -> None:
        """Generate a few tokens for nobody, so that what is compiled or opened at its first use is there.

        Raises:
            RaymoeError: the experts cannot be reached; nothing is left of the attempt.
        """
        id = "warm-up"
        self.add(id, [0], SamplingParams(max_tokens=_WARM_UP, temperature=0.0, ignore_eos=True))
        try:
            while self.has_work:
                self.step()
        finally:
            self.cancel(id)
            self.stats.proposed.clear()
            self.stats.accepted.clear()

    def replace(self, weights: TrunkWeights, experts: Experts) -> None:
        """Go on with other weights, between two steps; what is in the cache is computed again."""
        self.scheduler.restart()
        self.pool.clear()
        for sequence in self._sequences.values():
            if self._drafter is not None:
                self._drafter.forget(sequence)
        self._runner.replace(weights, experts)

    def step(self) -> list[Progress]:
        """Compute one step.

        Returns:
            What it brought every sequence that it touched.
        """
        began = self._clock()
        shares = sorted(self.scheduler.plan(), key=lambda share: share.end - share.start)
        if not shares:
            return []
        stretches = [
            Stretch(
                pages=share.sequence.pages,
                start=share.start,
                end=share.end,
                tokens=share.sequence.tokens(share.start, share.end),
            )
            for share in shares
        ]
        if self._on_step is not None:
            self._on_step(self.stats.steps)
        batch = self._runner.batch(stretches)
        counts, rows = _judged(shares, batch.ends)
        states = self._runner.compute(batch, rows)
        logits = self._split(counts, states.logits)
        progress: list[Progress] = []
        advances: list[Advance] = []
        chain = self._runner.weights.config.mtp_mode == "chain"
        given = states.normed if chain else states.hidden
        for share, end, (own, best) in zip(shares, batch.ends, logits, strict=True):
            sequence = share.sequence
            new = self._accept(share, own, best)
            certain = share.end - share.drafts + max(0, len(new) - 1)
            first = end - (share.end - share.start)
            progress.append(Progress(sequence, new))
            if sequence.finish_reason is not None:
                self._end(sequence, sequence.finish_reason)
                continue
            self.scheduler.computed(sequence, certain)
            if self._drafter is not None:
                own = given[first : first + certain - share.start]
                advances.append(Advance(sequence, share.start, certain, own, wants=bool(new)))
        if self._drafter is not None:
            self._draft(self._drafter, shares, advances, progress, began)
        self.stats.steps += 1
        return progress

    def _draft(
        self,
        drafter: Drafter,
        shares: Items[Share],
        advances: list[Advance],
        progress: list[Progress],
        began: float,
    ) -> None:
        """Make the drafts of the next step, if they pay."""
        generating = sum(share.samples for share in shares)
        pays = self.pacer is None or self.pacer.wants(max(1, generating))
        if pays:
            drafter.advance(advances)
            for advance in advances:  # no position is beyond the last there may be
                sequence = advance.sequence
                del sequence.drafts[self.longest - len(sequence) :]
        else:
            drafter.hold(advances)
        reads = any(share.end - share.start > 1 + share.drafts for share in shares)
        if self.pacer is not None and generating and not reads:
            tokens = sum(len(one.tokens) for one in progress)
            self.pacer.note(sequences=generating, drafted=pays, seconds=self._clock() - began, tokens=tokens)

    def _split(self, counts: list[int], logits: Tensor) -> list[tuple[Tensor, list[int]]]:
        """Each share's logits [n, V], and their likeliest tokens."""
        logits = logits[:, : self._vocabulary]
        if not len(logits):
            return [(logits, [])] * len(counts)
        best = iter(likeliest(logits))
        if len(counts) == 1:
            return [(logits, list(best))]
        return [
            (part, [next(best) for _ in range(count)])
            for part, count in zip(torch.split(logits, counts), counts, strict=True)
        ]

    def _accept(self, share: Share, logits: Tensor, greedy: list[int]) -> list[int]:
        """Draw a sequence's next tokens: one, and one more for each draft that is what is drawn."""
        sequence = share.sequence
        params = sequence.params
        if sequence.wants_prompt and share.start < len(sequence.prompt):
            self._note_prompt(share, logits)
            logits, greedy = logits[-1 - share.drafts :], greedy[-1 - share.drafts :]
        if not share.samples:
            return []
        drafts = sequence.drafts[: share.drafts]
        plain = params.greedy and not params.adjusts_logits and params.logprobs is None
        new: list[int] = []
        for at in range(len(drafts) + 1):
            if plain:
                token = greedy[at]
            else:
                row = adjusted(logits[at], params, sequence.prompt, sequence.output, sequence.ends)
                token = choose(row, params, sequence.rng.random())
                if params.logprobs is not None:
                    own, best = log_probabilities(logits[at], token, params.logprobs)
                    sequence.logprobs.append(TokenLogprobs(token=own, best=best))
            sequence.output.append(token)
            new.append(token)
            self._check_end(sequence, token)
            if at < len(drafts):
                self.stats.proposed[at] += 1
                self.stats.accepted[at] += drafts[at] == token
            if sequence.finish_reason is not None or at == len(drafts) or drafts[at] != token:
                break
        sequence.drafts.clear()
        return new

    def _note_prompt(self, share: Share, logits: Tensor) -> None:
        sequence = share.sequence
        for row, at in zip(logits, range(share.start + 1, len(sequence.prompt)), strict=False):
            if at > len(sequence.prompt_logprobs):  # not again after a preemption
                own, best = log_probabilities(row, sequence.prompt[at], sequence.params.logprobs or 0)
                sequence.prompt_logprobs.append(TokenLogprobs(token=own, best=best))

    def _check_end(self, sequence: Sequence, token: int) -> None:
        params, n_new = sequence.params, len(sequence.output)
        if token in sequence.ends and n_new > params.min_tokens:
            sequence.finish_reason = "stop"
        elif n_new >= params.max_tokens or len(sequence) >= self.longest:
            sequence.finish_reason = "length"

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self._sequences.pop(sequence.id, None)
        self.scheduler.remove(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence)


def _judged(shares: Items[Share], ends: Items[int]) -> tuple[list[int], list[int]]:
    """Whose logits count: a share's sample, its drafts, a prompt asked for. How many of each share, and
    which rows of the batch."""
    counts: list[int] = []
    rows: list[int] = []
    for share, end in zip(shares, ends, strict=True):
        count = 1 + share.drafts if share.samples else 0
        if share.sequence.wants_prompt and share.start < len(share.sequence.prompt):
            count = share.end - share.start
        counts.append(count)
        rows += range(end - count, end)
    return counts, rows


__all__ = ["Engine", "EngineSettings", "EngineStats", "Progress"]
