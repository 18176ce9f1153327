"""The engine: generates tokens for many sequences at once, step by step.

A step makes one pass of the trunk over all running sequences, with one call to the experts per layer, then
one pass of each MTP module. An engine is used by one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from engine.acceptance import Acceptance, EngineStats, needed_logits
from engine.batch import Stretch
from engine.drafter import Advance, Drafter
from engine.pacing import DraftPacer
from engine.pages import PagePool
from engine.params import SamplingParams, check_tokens
from engine.runner import Runner
from engine.scheduler import Scheduler, Share
from engine.sequence import Sequence
from engine.settings import EngineSettings
from engine.weights import TrunkWeights
from errors import ConfigError, described
from model.experts.protocols import Experts

_WARM_UP = 6  # tokens, enough that some are drafted


@dataclass(frozen=True, slots=True)
class NewTokens:
    """The tokens that a step generated for one sequence; `sequence.finish_reason` says whether it ended.

    Attributes:
        sequence: The sequence.
        tokens: The new tokens.
        error: Why the sequence ended without its next token; None unless its own choice of a token failed.
    """

    sequence: Sequence
    tokens: list[int]
    error: str | None = None


class Engine:
    """Generates for many requests at once.

    Args:
        weights: The trunk.
        experts: The routed experts.
        settings: Capacity of the engine.
        end_of_text: Tokens that end a text.
        vocabulary: Number of tokens of the tokenizer; the model's head may have more rows.
        on_step: Called with the number of each step before it begins.
        clock: Returns seconds.

    Attributes:
        settings: Settings of the engine.
        pool: The pages of the cache.
        scheduler: The running and waiting sequences.
        pacer: Decides whether drafts are made; None without drafts or without pacing.
        stats: Counters.
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
        self._acceptance = Acceptance(
            vocabulary=vocabulary or weights.config.vocab_size, longest=self.longest, stats=self.stats
        )

    @property
    def longest(self) -> int:
        """Tokens of prompt and output of a request together, at most."""
        return self.settings.longest(self._runner.weights.config.max_position_embeddings)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to compute."""
        return bool(self._sequences)

    def add(self, id: str, prompt: Items[int], params: SamplingParams, output: Items[int] = ()) -> Sequence:
        """Take a request.

        Args:
            id: Name of the request.
            prompt: Tokens of the prompt, at least one.
            params: How tokens are chosen and when the request ends.
            output: Tokens that another engine has generated for the request; generation continues after them.

        Raises:
            ConfigError: an empty prompt, a prompt that leaves no room for its tokens, an unknown token, an id
                that is in use, or an output that is complete.
        """
        if id in self._sequences:
            raise ConfigError(f"request {id!r} is running already; choose another id")
        if not prompt:
            raise ConfigError("prompt is empty; give one token at least")
        # The last token of a request needs no position, so a prompt of full length can have one.
        if len(prompt) > self.longest - (params.max_tokens > 1):
            raise ConfigError(
                f"prompt has {len(prompt)} tokens, which leaves no room within the {self.longest} that the"
                " model and its cache take; shorten it"
            )
        check_tokens(self._acceptance.vocabulary, prompt, params, output)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._end_of_text)}
        sequence = Sequence(
            id=id, prompt=list(prompt), params=params, ends=frozenset(ends), output=list(output)
        )
        if output:
            self._acceptance.set_finish_reason(sequence, output[-1])
        if sequence.finish_reason is not None:
            raise ConfigError(
                f"output has come to its end ({sequence.finish_reason}) with {len(output)} tokens; there is "
                "nothing to go on with"
            )
        self._sequences[id] = sequence
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, id: str) -> None:
        """Drop a request and free its pages; an unknown id is ignored."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, "abort")

    def finish(self, id: str, reason: str) -> None:
        """End a request for a reason outside the engine, such as a stop string in its text."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, reason)

    def warm_up(self) -> None:
        """Generate a few tokens and discard them, so that functions are compiled and connections are open.

        Raises:
            RaymoeError: the experts cannot be reached; the attempt leaves no sequence behind.
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
        """Change the weights between two steps; the cache of running sequences is computed again."""
        self.scheduler.restart()
        self.pool.clear()
        for sequence in self._sequences.values():
            if self._drafter is not None:
                self._drafter.forget(sequence)
        self._runner.replace(weights, experts)

    def step(self) -> list[NewTokens]:
        """Compute one step.

        Returns:
            The new tokens of every sequence that took part; a sequence may have none.
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
        counts, rows = needed_logits(shares, batch.ends)
        states = self._runner.compute(batch, rows)
        logits = self._acceptance.split(counts, states.logits)
        progress: list[NewTokens] = []
        advances: list[Advance] = []
        chain = self._runner.weights.config.mtp_mode == "chain"
        given = states.normed if chain else states.hidden
        for share, end, (own, best) in zip(shares, batch.ends, logits, strict=True):
            sequence = share.sequence
            try:
                new = self._acceptance.accept(share, own, best)
            except Exception as error:  # nothing of the other sequences depends on it
                self._end(sequence, "error")
                progress.append(NewTokens(sequence, [], described(error)))
                continue
            certain = share.end - share.drafts + max(0, len(new) - 1)
            first = end - (share.end - share.start)
            progress.append(NewTokens(sequence, new))
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
        progress: list[NewTokens],
        began: float,
    ) -> None:
        """Make the drafts of the next step, if drafts increase throughput."""
        generating = sum(share.samples for share in shares)
        pays = self.pacer is None or self.pacer.wants(max(1, generating))
        if pays:
            drafter.advance(advances)
            for advance in advances:  # no draft may lie beyond the longest sequence
                sequence = advance.sequence
                del sequence.drafts[self.longest - len(sequence) :]
        else:
            drafter.hold(advances)
        reads = any(share.end - share.start > 1 + share.drafts for share in shares)
        if self.pacer is not None and generating and not reads:
            tokens = sum(len(one.tokens) for one in progress)
            self.pacer.note(sequences=generating, drafted=pays, seconds=self._clock() - began, tokens=tokens)

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self._sequences.pop(sequence.id, None)
        self.scheduler.remove(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence)


__all__ = ["Engine", "NewTokens"]
