"""What Ray knows of a deployment's processes: whether they answer, and how they have ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import RayError

from jobs.serving.pool.process_losses import ProcessEnd, ProcessSigns

_DELIBERATE = (
    ActorDiedErrorContext.RAY_KILL,
    ActorDiedErrorContext.OWNER_DIED,
    ActorDiedErrorContext.OUT_OF_SCOPE,
    ActorDiedErrorContext.REF_DELETED,
)
"""Reasons of ends that Ray Serve brings about, or that come with the end of Serve itself."""

_NAMESPACE = "serve"  # of Ray Serve's actors
_ANSWER_SECONDS = 0.5


class ProcessInquiry:
    """Asks Ray about processes, and the processes themselves by calls of Ray; used by one thread at a time.

    These calls do not go through Ray Serve, whose own delays would make processes look as if they hung.
    """

    def __init__(self) -> None:
        self._pings: dict[str, Any] = {}

    def __call__(self, actors: Mapping[str, str]) -> ProcessSigns:
        """Which processes answer, and how others have ended.

        Args:
            actors: Names of processes, with the ids of their Ray actors.
        """
        self._pings = {name: ping for name, ping in self._pings.items() if name in actors}
        ends: dict[str, ProcessEnd] = {}
        for name, actor in actors.items():
            try:
                known = ray._private.state.actors(actor)
                if known.get("State") == "DEAD":
                    ends[name] = end_of(known["DeathCause"])
                elif known and name not in self._pings:
                    process = ray.get_actor(known["Name"], namespace=_NAMESPACE)
                    self._pings[name] = process.__ray_ready__.remote()
            except (RuntimeError, ValueError, RayError):  # it ends just now, or Ray's control service is away
                continue
        return ProcessSigns(ends=ends, answered=self._answered())

    def _answered(self) -> frozenset[str]:
        """Names of the processes that have answered."""
        if not self._pings:
            return frozenset()
        pings = list(self._pings.values())
        done, _ = ray.wait(pings, num_returns=len(pings), timeout=_ANSWER_SECONDS)
        ready = {name for name, ping in self._pings.items() if ping in done}
        return frozenset(name for name in ready if _succeeded(self._pings.pop(name)))


def _succeeded(ping: Any) -> bool:
    try:
        ray.get(ping)
    except RayError:
        return False
    return True


def end_of(cause: Any) -> ProcessEnd:
    """How an actor ended, from the `ActorDeathCause` of Ray."""
    if cause.WhichOneof("context") == "oom_context":
        return ProcessEnd(why="Ray ended its process, since its node was short of memory")
    reason = cause.actor_died_error_context.reason
    if reason in _DELIBERATE:
        return ProcessEnd(why="Ray Serve ended it", deliberate=True)
    return ProcessEnd(
        why="its node ended" if reason == ActorDiedErrorContext.NODE_DIED else "its process ended"
    )


__all__ = ["ProcessInquiry", "end_of"]
