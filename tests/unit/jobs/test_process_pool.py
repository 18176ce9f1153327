"""A pool of confined processes keeps nothing of questions that were given up."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

from jobs.confined.process_pool import ConfinedPool


class Idle:
    """A process that does nothing."""

    alive = True

    def lives(self) -> bool:
        return True

    def close(self) -> None:
        self.alive = False


class Question:
    """What a request asks, which can be large."""

    def __call__(self, _: Idle) -> str:
        return "answered"


def test_a_question_that_is_given_up_before_its_turn_is_dropped_at_once() -> None:
    async def run() -> None:
        pool: ConfinedPool[Idle] = ConfinedPool(Idle, name="idle", waiting=8, full="wait")
        go = threading.Event()
        try:
            busy = [asyncio.create_task(pool.ask(lambda _: go.wait(20))) for _ in range(2)]
            question = Question()
            kept = weakref.ref(question)
            waiting = asyncio.create_task(pool.ask(question))
            del question
            await asyncio.sleep(0)
            assert kept() is not None
            waiting.cancel()
            await asyncio.wait([waiting])
            del waiting
            gc.collect()
            assert kept() is None
            assert not any(task.done() for task in busy)
            go.set()
            assert await asyncio.gather(*busy) == [True, True]
            assert await pool.ask(Question()) == "answered"
        finally:
            go.set()
            pool.close()

    asyncio.run(run())
