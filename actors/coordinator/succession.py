"""What a coordinator leaves to the one after it; whoever runs it keeps this, and hosts keep the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from actors.coordinator.placement_changes import Elastic
from actors.coordinator.routing_tables import without
from actors.messages.coordinator_state import PlacedWeights
from errors import RaymoeError


def epochs_held(elastic: Elastic) -> dict[str, set[int]]:
    """What live hosts hold experts under; those that do not answer are buried."""
    elastic.bury_the_dead("a coordinator began")
    found: dict[str, set[int]] = {}
    for id, (_, host) in elastic.hosts().items():
        try:
            stats = host.stats()
        except RaymoeError:  # it has died since, as its next call will tell
            continue
        found[id] = set(stats.epochs) if stats.experts or len(stats.epochs) > 1 else set()
    return found


def still_held(versions: Sequence[PlacedWeights], held: dict[str, set[int]]) -> list[PlacedWeights]:
    """What is left of versions on the hosts that are there; those of which nothing is are left out."""
    found = []
    for version in versions:
        placement = version.placement
        for site in placement.sites:
            if version.epoch not in held.get(site, ()):
                placement = without(placement, site)
        if placement.sites:
            found.append(replace(version, placement=placement))
    return found


__all__ = ["epochs_held", "still_held"]
