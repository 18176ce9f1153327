"""Lanes take turns: one computes while others wait, and never two at once."""

from __future__ import annotations

import threading

from actors.router.lane_turns import Turns


def test_one_computes_while_another_is_away() -> None:
    turns = Turns(1)
    computing: list[str] = []
    seen: list[tuple[str, ...]] = []
    replies = {name: threading.Event() for name in "ab"}
    away = {name: threading.Event() for name in "ab"}

    def lane(name: str) -> None:
        with turns.taken():
            computing.append(name)
            seen.append(tuple(computing))
            computing.remove(name)
            with turns.away():
                away[name].set()
                assert replies[name].wait(30)
            computing.append(name)
            seen.append(tuple(computing))
            computing.remove(name)

    threads = [threading.Thread(target=lane, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    assert all(event.wait(30) for event in away.values())  # the second computed while the first was away
    for name in "ba":
        replies[name].set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(seen) == [("a",), ("a",), ("b",), ("b",)]


def test_a_lane_that_fails_gives_its_turn_back() -> None:
    turns = Turns(1)
    for _ in range(3):
        try:
            with turns.taken(), turns.away():
                raise ValueError
        except ValueError:
            pass
    with turns.taken():
        assert not turns._free.acquire(blocking=False)
    assert turns._free.acquire(blocking=False)
