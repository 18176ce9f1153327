"""Drafts of the MTP modules for speculative decoding, and the modules' entries in the KV cache.

Module k joins the state h^(k-1) of position i with the embedding of token i + k (eq. 21 of arXiv 2412.19437)
and predicts token i + k + 1. Its cache entry of a position is certain once token i + k is certain. Entries
computed from drafts are computed again in the next step, after the drafts have been verified. For that, the
states of the module before are kept for fewer than k positions of each sequence.
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
"""Positions of a sequence whose states are kept for a module, at most. Beyond that, older cache entries of
the modules are not computed, which lowers the acceptance of drafts and has no other effect."""


@dataclass(slots=True)
class _ModuleState:
    """State of one module for one sequence.

    Attributes:
        done: Number of positions whose cache entries are certain.
        held: States of later positions.
    """

    done: int
    held: list[Tensor] = field(default_factory=list)

    def states(self) -> Tensor | None:
        """States [n, D] of the positions from `done` on."""
        if len(self.held) > 1:
            self.held = [torch.cat(self.held)]
        return self.held[0] if self.held else None


@dataclass(slots=True)
class _Trail:
    """State of all modules for one sequence.

    Attributes:
        end: Number of positions that the trunk has computed.
        modules: State of each module.
    """

    end: int
    modules: list[_ModuleState]


@dataclass(frozen=True, slots=True)
class Advance:
    """Positions of a sequence that the trunk has just computed.

    Attributes:
        sequence: The sequence.
        start: First position.
        end: Position after the last one.
        states: [end - start, D], input of the first module.
        wants: Whether drafts are made: the token at `end` is the sequence's newest.
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
        runner: Computes the modules.
        depth: Number of modules used.
        chain: Whether a module takes the states of the module before, see `ModelConfig.mtp_mode`.
    """

    runner: Runner
    depth: int
    chain: bool
    _trails: dict[str, _Trail] = field(default_factory=dict)

    def forget(self, sequence: Sequence) -> None:
        """Drop the state of a sequence that has ended or lost its pages."""
        self._trails.pop(sequence.id, None)

    def advance(self, advances: Items[Advance]) -> None:
        """Run every module up to the trunk's last position, and store drafts in the sequences."""
        if not advances:
            return
        for advance in advances:
            self._follow(advance)
        states = {advance.sequence.id: (advance.start, advance.states) for advance in advances}
        for k in range(1, self.depth + 1):
            states = self._run(k, advances, states)

    def hold(self, advances: Items[Advance]) -> None:
        """Make no drafts in this step, but keep the states that later drafts need."""
        for advance in advances:
            trail = self._follow(advance)
            if advance.end - trail.modules[0].done > _MOST_HELD:
                trail.modules = [_ModuleState(done=advance.end) for _ in trail.modules]
                continue
            # In a chain the states of the other modules are computed from those of the first.
            for progress in trail.modules[:1] if self.chain else trail.modules:
                progress.held.append(advance.states.clone())

    def _follow(self, advance: Advance) -> _Trail:
        """The trail of a sequence, updated to `advance.end`."""
        advance.sequence.drafts.clear()
        trail = self._trails.get(advance.sequence.id)
        if trail is None or trail.end != advance.start:  # its first positions, or again after a preemption
            modules = [_ModuleState(done=advance.start) for _ in range(self.depth)]
            trail = self._trails[advance.sequence.id] = _Trail(advance.end, modules)
        trail.end = advance.end
        return trail

    def _run(
        self, k: int, advances: Items[Advance], before: dict[str, tuple[int, Tensor]]
    ) -> dict[str, tuple[int, Tensor]]:
        """Run module k over all sequences; return first position and states of each, for the next module."""
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
        """Positions, tokens and input states that module k computes for a sequence in this step, if any."""
        sequence = advance.sequence
        progress = self._trails[sequence.id].modules[k - 1]
        before = progress.states()
        if progress.done < first and before is not None:
            # For positions in both, the earlier states were computed from drafts.
            states = torch.cat((before[: first - progress.done], states))
            first = progress.done
        elif progress.done < first:  # the states of some positions were dropped: their entries stay unchanged
            progress.done = first
        # `parallel` mode reads no token, but entries are computed in the order of positions all the same.
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
