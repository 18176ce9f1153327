"""Actors of a job as its fleet holds them, and the functions that build what runs in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.coordinator.coordinator import Coordinator
from actors.host import ExpertHost
from actors.messages.coordinator_state import CoordinatorState
from actors.messages.job_identity import JobIdentity
from cluster.topology import HostInfo


@dataclass(slots=True)
class HostActor:
    """The actor of one expert host.

    Attributes:
        actor: Handle of the actor.
        asked: Ray's reference to the host's address, until it has started.
        lease: Ray's reference to a call that lasts as long as the actor.
        began: When the host was started, by `time.monotonic`.
        meant_for: Id of the node that is to take it; '' if Ray chooses.
        info: The host's address; None until it has started.
    """

    actor: Any
    asked: Any
    lease: Any
    began: float
    meant_for: str = ""
    info: HostInfo | None = None

    @property
    def node(self) -> str:
        """Id of the host's node, or of the one that is to take it; '' if that is not known yet."""
        return self.meant_for if self.info is None else self.info.node


def kill(actor: Any) -> None:
    """End an actor at once; None and an actor that is gone are left alone."""
    if actor is not None:
        with suppress(RayError):
            ray.kill(actor)


@dataclass(frozen=True, slots=True)
class HostBuilder:
    """Builds the expert host of a name."""

    build: Callable[[str], ExpertHost]
    id: str

    def __call__(self) -> ExpertHost:
        return self.build(self.id)


@dataclass(frozen=True, slots=True)
class CoordinatorBuilder:
    """Builds a coordinator from the state of the one before, and tells it what its job is called."""

    build: Callable[[CoordinatorState | None], Coordinator]
    state: CoordinatorState | None
    job: JobIdentity

    def __call__(self) -> Coordinator:
        coordinator = self.build(self.state)
        coordinator.job = self.job
        return coordinator


__all__ = ["CoordinatorBuilder", "HostActor", "HostBuilder", "kill"]
