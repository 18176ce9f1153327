"""State of a job for people and programs that operate it: what `raymoe status --json` prints."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.training_steps import TrainingSteps
from actors.messages.host_control import HostStats
from channels.choose import taken
from errors import RaymoeError


def describe(placements: PlacementController, training: TrainingSteps | None, channel: str) -> dict[str, Any]:
    """State of the job without its events.

    Args:
        placements: The hosts and what they hold.
        training: Steps of a training run; None in serving.
        channel: As in `cluster.channel`.
    """
    published = placements.published
    current = published.current
    holders = () if current is None else current.placement.holders
    copies = [len(ids) for row in holders for ids in row]
    pauses = () if training is None else tuple(training.pauses)
    return {
        "mode": "serve" if training is None else "train",
        "epoch": -1 if current is None else current.epoch,
        "serial": published.serial,
        "weights": "" if current is None else current.name,
        "reloads": placements.reloads,
        "bias_version": 0 if training is None else training.step,
        "step": None if training is None else training.step,
        "steps": None if training is None else training.total,
        "steps_to_go": None if training is None else max(0, training.total - training.step),
        "attempt": None if training is None else training.attempt,
        "hosts": describe_hosts(placements, channel),
        "replicas_min": min(copies, default=0),
        "replicas_max": max(copies, default=0),
        "pauses": [{"why": why, "seconds": seconds} for why, seconds in pauses],
    }


def doing(placements: PlacementController, training: TrainingSteps | None) -> str:
    """What the job does, in a few words."""
    if training is not None:
        return f"trains, at step {training.step} of {training.total}"
    current = placements.published.current
    return "serves" if current is None else f"serves the weights {current.name}"


def describe_hosts(placements: PlacementController, channel: str) -> list[dict[str, Any]]:
    """State of every live host."""
    current = placements.published.current
    held = {} if current is None else current.placement.holding()
    stages, found = placements.roster.stages(), []
    for id, (info, client) in placements.roster.hosts().items():
        stats: HostStats | None = None
        with suppress(RaymoeError):
            stats = client.stats()
        found.append(
            {
                "id": id,
                "node": info.node,
                "pid": info.pid,
                "addresses": dict(info.addresses),
                "state": str(stages.get(id, "gone")),
                "channel": taken(channel, info.addresses),
                "experts": sum(map(len, held.get(id, ()))),
                "answers": stats is not None,
                "in_flight": 0 if stats is None else stats.in_flight,
                "rows": 0 if stats is None else stats.rows,
                "busy_seconds": 0.0 if stats is None else stats.busy_seconds,
            }
        )
    return found


__all__ = ["describe", "describe_hosts", "doing"]
