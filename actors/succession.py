"""What a coordinator leaves to the one after it; whoever runs it keeps this, and hosts keep the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from actors.elastic import Elastic
from actors.published import Placed, without
from cluster.placement import Placement
from errors import RaymoeError


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a coordinator that takes over begins with.

    Attributes:
        wanted: hosts that there should be.
        versions: what hosts held, as far as was known.
        leaving: hosts that were to go.
    """

    wanted: int
    versions: tuple[Placed, ...]
    serial: int
    leaving: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> State:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(
            wanted=values["wanted"],
            serial=values["serial"],
            leaving=tuple(values["leaving"]),
            versions=tuple(
                Placed(
                    name=one["name"],
                    epoch=one["epoch"],
                    directory=one["directory"],
                    placement=Placement(
                        sites=tuple(one["placement"]["sites"]),
                        holders=tuple(tuple(map(tuple, row)) for row in one["placement"]["holders"]),
                    ),
                )
                for one in values["versions"]
            ),
        )


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


def still_held(versions: Sequence[Placed], held: dict[str, set[int]]) -> list[Placed]:
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


__all__ = ["State", "epochs_held", "still_held"]
