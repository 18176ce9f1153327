"""Schedules steps: continuous batching with chunked prefill and preemption. No torch here.

Every running sequence gets a share of each step: one position and its drafts if it generates, or a chunk of
its prompt. When pages run out, the sequence that started last is preempted: it loses its pages, keeps its
tokens, and computes its cache entries again later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.pages import PagePool
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step: positions start … end - 1, the last `drafts` of which are drafts."""

    sequence: Sequence
    start: int
    end: int
    drafts: int

    @property
    def samples(self) -> bool:
        """Whether the share computes the last certain position, whose logits give the next token."""
        return self.end - self.drafts == len(self.sequence)


class Scheduler:
    """Keeps the waiting and running sequences, and allocates their pages.

    Args:
        pool: The pages.
        max_batch_tokens: Positions of a step, at most.
        max_sequences: Sequences that run at the same time, at most.

    Attributes:
        waiting: Sequences without pages, in the order in which they start.
        running: Sequences with pages, in the order in which they started.
        preemptions: Number of preemptions so far.
    """

    def __init__(self, pool: PagePool, *, max_batch_tokens: int, max_sequences: int) -> None:
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that another engine has begun goes before those that have no output yet."""
        if not sequence.resumed:
            self.waiting.append(sequence)
            return
        begun = (bool(other.output) for other in self.waiting)
        self.waiting.insert(
            next((at for at, one in enumerate(begun) if not one), len(self.waiting)), sequence
        )

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended or was cancelled, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def plan(self) -> list[Share]:
        """The shares of the next step; allocates the pages for all of its positions."""
        budget = self._max_batch_tokens
        shares: list[Share] = []
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            share = self._share(sequence, budget)
            while not self._reserve(sequence, share.end):
                # Preempt the last sequence; if that is this one, it drops its drafts first.
                victim = self.running[-1]
                if victim is sequence and share.drafts:
                    sequence.drafts.clear()
                    share = self._share(sequence, budget)
                    continue
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                shares.append(share)
                budget -= share.end - share.start
                index += 1
        while self.waiting and budget > 0 and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            self._find_prefix(sequence)
            share = self._share(sequence, budget)
            if not self._reserve(sequence, share.end):
                self._release(sequence)
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.begun = True
            shares.append(share)
            budget -= share.end - share.start
        return shares

    def restart(self) -> None:
        """Preempt all running sequences, which then compute all positions again."""
        for sequence in reversed(self.running):
            self._release(sequence)
            self.waiting.appendleft(sequence)
        self.running.clear()

    def computed(self, sequence: Sequence, positions: int) -> None:
        """Record that the cache entries of a sequence up to `positions` are computed and certain."""
        sequence.computed = positions
        if positions // self._pool.page_size > sequence.known_pages:
            sequence.known_pages = self._pool.remember(
                sequence.pages, sequence.all_tokens[:positions], done=sequence.known_pages
            )

    def _share(self, sequence: Sequence, budget: int) -> Share:
        start, certain = sequence.computed, len(sequence)
        end = min(certain, start + budget)
        drafts = min(len(sequence.drafts), start + budget - end) if end == certain else 0
        return Share(sequence, start, end + drafts, drafts)

    def _reserve(self, sequence: Sequence, positions: int) -> bool:
        missing = self._pool.pages_for(positions) - len(sequence.pages)
        if missing > self._pool.available:
            return False
        for _ in range(missing):
            page = self._pool.take()
            assert page is not None
            sequence.pages.append(page)
        return True

    def _find_prefix(self, sequence: Sequence) -> None:
        if sequence.pages or sequence.wants_prompt:  # prompt log probabilities need all positions
            return
        # The last token is always computed, because its logits are needed.
        tokens = sequence.all_tokens
        sequence.pages = self._pool.find(tokens[:-1])
        sequence.known_pages = len(sequence.pages)
        sequence.computed = len(sequence.pages) * self._pool.page_size
        if not sequence.begun and not sequence.resumed:  # later it finds entries that it computed itself
            sequence.cached = sequence.computed

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pool.give_back(sequence.pages)
        sequence.pages = []
        sequence.known_pages = sequence.computed = 0
        sequence.drafts.clear()


__all__ = ["Scheduler", "Share"]
