"""A step in two halves has equal numbers of positions in each, in the same order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Stretch, by_length, halved


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=20))
def test_halves_are_the_whole_in_order(sizes: list[tuple[int, int]]) -> None:
    stretches = [
        Stretch(pages=[at], start=start, end=start + n, tokens=list(range(100 * at, 100 * at + n)))
        for at, (start, n) in enumerate(sizes)
    ]
    first, second = halved(stretches)
    rows = [
        (stretch.pages[0], position, token)
        for stretch in (*first, *second)
        for position, token in zip(range(stretch.start, stretch.end), stretch.tokens, strict=True)
    ]
    assert rows == [
        (stretch.pages[0], position, token)
        for stretch in stretches
        for position, token in zip(range(stretch.start, stretch.end), stretch.tokens, strict=True)
    ]
    counts = [sum(map(by_length, half)) for half in (first, second)]
    assert 0 <= counts[1] - counts[0] <= 1
