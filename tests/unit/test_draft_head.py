"""A head in 8 bits says nearly always what the head itself says."""

from __future__ import annotations

import numpy as np

from engine.draft_head import DraftHead


def test_drafts_are_nearly_always_the_likeliest_tokens() -> None:
    source = np.random.default_rng(0)
    head = source.standard_normal((3000, 64)).astype(np.float32) * source.uniform(0.1, 3, (3000, 1))
    states = source.standard_normal((300, 64))
    said = np.concatenate([DraftHead.of(head).likeliest(states[n : n + 10]) for n in range(0, 300, 10)])
    logits = states @ head.T
    assert (said == logits.argmax(1)).mean() > 0.95
    assert (logits.max(1) - logits[np.arange(300), said]).max() < 0.02 * logits.std()


def test_rows_of_zeros_are_rows_of_zeros() -> None:
    head = np.zeros((5, 4), np.float32)
    head[3] = [1, -2, 0, 2]
    found = DraftHead.of(head)
    assert (found.rows[[0, 1, 2, 4]] == 0).all()
    assert found.rows[3].tolist() == [64, -127, 0, 127]
    assert found.likeliest(np.array([[1.0, -1, 0, 1], [-1, 1, 0, -1]], np.float32)) == [3, 0]
