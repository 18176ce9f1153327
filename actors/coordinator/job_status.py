"""How a job stands, for people and programs that operate it: what `raymoe status --json` prints."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from actors.coordinator.placement_changes import Elastic
from actors.coordinator.routing_tables import holding
from actors.coordinator.training_steps import TrainingSteps
from actors.messages.steps import HostStats
from channels.choose import taken
from errors import RaymoeError


def describe(elastic: Elastic, training: TrainingSteps | None, channel: str) -> dict[str, Any]:
    """The job but for what happened to it; `channel` as `cluster.channel`."""
    current = elastic.versions.current
    holders = () if current is None else current.placement.holders
    copies = [len(ids) for row in holders for ids in row]
    pauses = () if training is None else tuple(training.pauses)
    return {
        "mode": "serve" if training is None else "train",
        "epoch": -1 if current is None else current.epoch,
        "serial": elastic.versions.serial,
        "weights": "" if current is None else current.name,
        "bias_version": 0 if training is None else training.step,
        "step": None if training is None else training.step,
        "attempt": None if training is None else training.attempt,
        "hosts": describe_hosts(elastic, channel),
        "replicas_min": min(copies, default=0),
        "replicas_max": max(copies, default=0),
        "pauses": [{"why": why, "seconds": seconds} for why, seconds in pauses],
    }


def describe_hosts(elastic: Elastic, channel: str) -> list[dict[str, Any]]:
    """Every host."""
    current = elastic.versions.current
    held = {} if current is None else holding(current.placement)
    stages, found = elastic.stages(), []
    for id, (info, control) in elastic.hosts().items():
        stats: HostStats | None = None
        with suppress(RaymoeError):
            stats = control.stats()
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


__all__ = ["describe", "describe_hosts"]
