"""Drafts from the MTP modules, with their entries in the cache kept in step with what is certain.

Module k joins the state h^(k-1) of position i with the embedding of token i + k (eq. 21 of arXiv 2412.19437)
and tells token i + k + 1. Its entry of a position is certain once token i + k is; entries made with drafts
are made again in the next step, when it is known what became of them. For that the states of the module
before are kept, of fewer than k positions a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import Stretch, by_length
from engine.runner import Runner
from engine.sequence import Sequence

_MOST_HELD = 4096
"""Positions of a sequence whose states wait for a module; were there more, older entries stay unmade, which
makes drafts worse and nothing else."""


@dataclass(slots=True)
class _Progress:
    """One module's progress with one sequence: positions whose entries are certain, and states after them."""

    done: int
    held: list[Tensor] = field(default_factory=list)

    def states(self) -> Tensor | None:
        """[n, D], of the positions from `done` on."""
        if len(self.held) > 1:
            self.held = [torch.cat(self.held)]
        return self.held[0] if self.held else None


@dataclass(slots=True)
class _Trail:
    """All modules' progress with one sequence, and how far the trunk has come."""

    end: int
    modules: list[_Progress]


@dataclass(frozen=True, slots=True)
class Advance:
    """A sequence whose positions start … end - 1 the trunk has just computed.

    Attributes:
        states: [end - start, D], what the first module takes.
        wants: whether drafts are to be made: the token after the last position is its newest.
    """

    sequence: Sequence
    start: int
    end: int
    states: Tensor
    wants: bool


@dataclass(slots=True)
class Drafter:
    """Runs the MTP modules after each step of the trunk.

    Args:
        runner: computes.
        depth: modules to use.
        chain: whether a module takes the states of the one before, see `ModelConfig.mtp_mode`.
    """

    runner: Runner
    depth: int
    chain: bool
    _trails: dict[str, _Trail] = field(default_factory=dict)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended, or lost its pages."""
        self._trails.pop(sequence.id, None)

    def advance(self, advances: Items[Advance]) -> None:
        """Bring every module up to the trunk, and leave drafts with the sequences that want some."""
        if not advances:
            return
        for advance in advances:
            self._follow(advance)
        states = {advance.sequence.id: (advance.start, advance.states) for advance in advances}
        for k in range(1, self.depth + 1):
            states = self._run(k, advances, states)

    def hold(self, advances: Items[Advance]) -> None:
        """Let the trunk go on without drafts: the modules' entries are made when drafts are wanted again."""
        for advance in advances:
            trail = self._follow(advance)
            if advance.end - trail.modules[0].done > _MOST_HELD:
                trail.modules = [_Progress(done=advance.end) for _ in trail.modules]
                continue
            # In a chain the first module's states are all that is needed to make the others'.
            for progress in trail.modules[:1] if self.chain else trail.modules:
                progress.held.append(advance.states.clone())

    def _follow(self, advance: Advance) -> _Trail:
        """The trail of a sequence, which the trunk has brought to `advance.end`."""
        advance.sequence.drafts.clear()
        trail = self._trails.get(advance.sequence.id)
        if trail is None or trail.end != advance.start:  # its first positions, again after a preemption
            modules = [_Progress(done=advance.start) for _ in range(self.depth)]
            trail = self._trails[advance.sequence.id] = _Trail(advance.end, modules)
        trail.end = advance.end
        return trail

    def _run(
        self, k: int, advances: Items[Advance], before: dict[str, tuple[int, Tensor]]
    ) -> dict[str, tuple[int, Tensor]]:
        """Module k over every sequence; first position and states by sequence, for the module after it."""
        work: list[tuple[Advance, Stretch, Tensor]] = []
        for advance in advances:
            made = self._prepare(k, advance, *before[advance.sequence.id])
            if made is not None:
                work.append((advance, *made))
        if not work:
            return before if not self.chain else {a.sequence.id: (a.end, a.states[:0]) for a in advances}
        work.sort(key=lambda item: by_length(item[1]))
        batch = self.runner.draft_batch([stretch for _, stretch, _ in work])
        before_it = work[0][2] if len(work) == 1 else torch.cat([states for _, _, states in work])
        drafting = {
            end - 1: advance.sequence
            for (advance, stretch, _), end in zip(work, batch.ends, strict=True)
            if advance.wants and stretch.end == advance.end
        }
        if self.chain and k < self.depth:  # the next module takes the states of all rows
            hidden = self.runner.draft(k, batch, before_it, range(batch.ends[-1]))
            last = hidden[list(drafting)]
            before = {a.sequence.id: (a.end, a.states[:0]) for a in advances}
            row = 0
            for (advance, stretch, _), end in zip(work, batch.ends, strict=True):
                before[advance.sequence.id] = (stretch.start, hidden[row:end])
                row = end
        else:
            last = self.runner.draft(k, batch, before_it, list(drafting))
        if drafting:
            for sequence, token in zip(drafting.values(), self.runner.draft_tokens(last), strict=True):
                sequence.drafts.append(token)
        return before

    def _prepare(self, k: int, advance: Advance, first: int, states: Tensor) -> tuple[Stretch, Tensor] | None:
        """What module k computes of a sequence now: positions, tokens and the states it takes."""
        sequence = advance.sequence
        progress = self._trails[sequence.id].modules[k - 1]
        before = progress.states()
        if progress.done < first and before is not None:
            # Of positions in both, what was known before was made with drafts.
            states = torch.cat((before[: first - progress.done], states))
            first = progress.done
        elif progress.done < first:  # the states of some positions are gone: their entries stay as they are
            progress.done = first
        # In `parallel` mode no token is read, but entries of positions follow one another all the same.
        shift = k if self.chain else 0
        certain = len(sequence) - shift
        end = advance.end if advance.wants else min(advance.end, certain)
        start = progress.done
        progress.done = max(start, min(end, certain)) if self.chain else end
        progress.held = [states[progress.done - first :].clone()] if progress.done < advance.end else []
        if end <= start:
            return None
        tokens = sequence.tokens(start + shift, end + shift)
        stretch = Stretch(pages=sequence.pages, start=start, end=end, tokens=tokens)
        return stretch, states[start - first : end - first]


__all__ = ["Advance", "Drafter"]
