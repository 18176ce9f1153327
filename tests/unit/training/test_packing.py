"""Packing loses and repeats nothing for any blocks; batches are functions of the step."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.batches import microbatch_rows, microbatches_of_worker, rows_of_step
from jobs.data.packing import PADDING, PackedCorpus, pack

END = 99
documents = st.lists(st.lists(st.integers(0, 50), max_size=20), min_size=1, max_size=12)


def _stream(texts: list[list[int]]) -> tuple[list[int], list[int]]:
    tokens = [token for text in texts for token in [*text, END]]
    owners = [i for i, text in enumerate(texts) for _ in range(len(text) + 1)]
    return tokens, owners


@given(texts=documents, length=st.integers(1, 7), depth=st.integers(0, 3), per_block=st.integers(1, 4))
def test_rows_are_the_stream_cut_with_their_overlap(
    texts: list[list[int]], length: int, depth: int, per_block: int
) -> None:
    tokens, owners = _stream(texts)
    corpus = pack(texts, sequence_length=length, depth=depth, end_of_text=END, rows_per_block=per_block)
    assert corpus.n_rows == max(0, (len(tokens) - 1 - depth) // length)
    for r in range(corpus.n_rows):
        row, segments = corpus.row(r)
        span = slice(r * length, r * length + length + 1 + depth)
        assert row.tolist() == tokens[span]
        assert segments.tolist() == owners[span]
        assert row.dtype == segments.dtype == np.int32


@given(texts=documents, length=st.integers(1, 7), depth=st.integers(0, 3), per_block=st.integers(1, 4))
def test_padded_rows_score_every_token_but_each_documents_first_once(
    texts: list[list[int]], length: int, depth: int, per_block: int
) -> None:
    tokens, owners = _stream(texts)
    corpus = pack(
        texts, sequence_length=length, depth=depth, end_of_text=END, pad=True, rows_per_block=per_block
    )
    scored: Counter[int] = Counter()
    for r in range(corpus.n_rows):
        row, segments = corpus.row(r)
        valid = [i for i in range(length) if segments[i] == segments[i + 1] != PADDING]
        assert corpus.count_targets([r]) == len(valid)
        for i in valid:
            scored[r * length + i + 1] += 1
            assert row[i + 1] == tokens[r * length + i + 1]
    firsts = {i for i in range(len(owners)) if i == 0 or owners[i] != owners[i - 1]}
    assert scored == Counter(set(range(len(tokens))) - firsts)


@given(texts=documents, length=st.integers(1, 7), depth=st.integers(0, 3))
def test_the_size_of_blocks_does_not_show(texts: list[list[int]], length: int, depth: int) -> None:
    def all_rows(corpus: PackedCorpus) -> list[list[list[int]]]:
        return [[part.tolist() for part in corpus.row(i)] for i in range(corpus.n_rows)]

    for pad in (False, True):
        shape = {"sequence_length": length, "depth": depth, "end_of_text": END, "pad": pad}
        whole = pack(texts, **shape, rows_per_block=1000)
        assert all_rows(pack(texts, **shape, rows_per_block=2)) == all_rows(whole)


def test_targets_of_a_global_batch_add_up() -> None:
    corpus = pack([[1, 2, 3], [4], [5, 6]], sequence_length=2, depth=1, end_of_text=END)
    assert [corpus.count_targets([i]) for i in range(corpus.n_rows)] == [2, 1, 1]
    assert corpus.count_targets([2, 0, 0]) == 5
    tokens, segments = corpus.rows([1, 0])
    assert tokens.tolist() == [[3, END, 4, END], [1, 2, 3, END]]
    assert segments.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]


def test_a_corpus_pickles_without_what_it_fetched() -> None:
    fetched = []

    class Elsewhere:
        def __init__(self, value: object) -> None:
            self.value = value

        def get(self) -> object:
            fetched.append(1)
            return self.value

    packed = pack([list(range(40))], sequence_length=4, depth=0, end_of_text=END, rows_per_block=2)
    blocks = [Elsewhere(stored.get()) for stored in packed._stored]
    corpus = PackedCorpus(
        blocks,  # type: ignore[arg-type]
        packed._targets,
        n_rows=packed.n_rows,
        rows_per_block=2,
        sequence_length=4,
        depth=0,
        keep_blocks=2,
    )
    for row in (0, 1, 0, 2, 3):
        corpus.row(row)
    assert len(fetched) == 2
    corpus.row(4)  # a third block drops the one that was not used for longest
    corpus.row(2)
    assert len(fetched) == 3
    corpus.row(0)
    assert len(fetched) == 4
    assert corpus.__getstate__()["_blocks"] == {}
    again = pickle.loads(pickle.dumps(packed))
    assert again.row(3)[0].tolist() == packed.row(3)[0].tolist()


def test_a_row_that_is_not_there_is_an_error() -> None:
    corpus = pack([[1, 2, 3]], sequence_length=2, depth=0, end_of_text=END)
    for index in (-1, corpus.n_rows):
        with pytest.raises(IndexError):
            corpus.row(index)


@given(n_rows=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 2**64 - 1))
def test_an_epoch_sees_every_row_once(n_rows: int, batch: int, seed: int) -> None:
    steps = -(-3 * n_rows // batch)
    seen = np.concatenate(
        [rows_of_step(step, n_rows=n_rows, batch_size=batch, seed=seed) for step in range(steps)]
    )
    for epoch in range(3):
        assert sorted(seen[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_the_order_depends_on_seed_and_epoch_and_stays_the_same_for_ever() -> None:
    first = rows_of_step(0, n_rows=8, batch_size=8, seed=0).tolist()
    assert first == [0, 2, 1, 5, 4, 3, 6, 7]
    assert rows_of_step(1, n_rows=8, batch_size=8, seed=0).tolist() != first
    assert rows_of_step(0, n_rows=8, batch_size=8, seed=1).tolist() != first


@given(workers=st.integers(1, 6), count=st.integers(1, 12), size=st.integers(1, 4))
def test_workers_share_out_a_global_batch(workers: int, count: int, size: int) -> None:
    rows = np.arange(count * size)
    taken = [
        row
        for rank in range(workers)
        for microbatch in microbatches_of_worker(rank, workers, count)
        for row in microbatch_rows(rows, size, microbatch)
    ]
    assert sorted(taken) == list(rows)
    sizes = [len(microbatches_of_worker(rank, workers, count)) for rank in range(workers)]
    assert max(sizes) - min(sizes) <= 1
