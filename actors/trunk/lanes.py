"""The lanes of a worker: threads that compute its microbatches, several at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Protocol, TypeVar, cast

from actors.router.connections import LaneCounters
from actors.router.lane_turns import Turns
from actors.trunk.step_inputs import Microbatch
from errors import RaymoeError
from model.experts.protocols import Experts

T = TypeVar("T")


class StepLane(Experts, Protocol):
    """The routed experts as one lane reaches them; see `actors.router.lane.Lane`."""

    @property
    def counters(self) -> LaneCounters: ...

    def begin(self, step: int, microbatch: int) -> None: ...

    def abandon(self) -> None: ...

    def raise_deferred(self) -> None: ...


class LaneThreads:
    """One thread per lane for the worker's lifetime, so that channels and thread pools are reused.

    Args:
        lanes: One for each microbatch in flight; `DeferringLane`s where passes take all workers.
        turns: Limit on the lanes that compute at once; None if they share the cores.
    """

    def __init__(self, lanes: Sequence[StepLane], turns: Turns | None = None) -> None:
        self._lanes, self._turns = tuple(lanes), turns
        self._threads = [
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"lane-{i}") for i in range(len(lanes))
        ]

    def counters(self) -> LaneCounters:
        """Sums over the lanes."""
        total = LaneCounters()
        for lane in self._lanes:
            total.tokens += lane.counters.tokens
            total.rows += lane.counters.rows
            total.bytes += lane.counters.bytes
        return total

    def map(
        self, step: int, microbatches: Sequence[Microbatch], work: Callable[[StepLane, Microbatch], T]
    ) -> list[T]:
        """Do the work of all microbatches, as many at once as there are lanes; results in their order.

        Raises:
            The first error of a lane, raised after all lanes have stopped.
        """
        # A waiting microbatch goes to the next free lane; after an error no lane takes another.
        waiting = deque(enumerate(microbatches))
        results: list[T | None] = [None] * len(microbatches)

        def serve(lane: StepLane) -> None:
            while waiting:
                try:
                    at, microbatch = waiting.popleft()
                except IndexError:
                    return
                with self._turns.taken() if self._turns is not None else nullcontext():
                    try:
                        lane.begin(step, microbatch.index)
                        results[at] = work(lane, microbatch)
                    except BaseException:
                        waiting.clear()
                        lane.abandon()
                        raise

        futures = [
            thread.submit(serve, lane) for thread, lane in zip(self._threads, self._lanes, strict=True)
        ]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return cast("list[T]", results)

    def run_alone(self, work: Callable[[], object]) -> None:
        """Do some work in the first lane's thread, while the others are idle."""
        self._threads[0].submit(work).result()

    def raise_deferred(self) -> None:
        """Forget the errors that the lanes have deferred.

        Raises:
            RaymoeError: The first of them.
        """
        errors: list[RaymoeError] = []
        for lane in self._lanes:
            try:
                lane.raise_deferred()
            except RaymoeError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)


__all__ = ["LaneThreads", "StepLane"]
