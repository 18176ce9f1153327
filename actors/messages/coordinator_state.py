"""State that a coordinator passes to the next one: the placed weights, and the number of hosts wanted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from cluster.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWeights:
    """A version of the weights, placed on hosts under one epoch.

    Attributes:
        name: Name of the weights; empty in training.
        epoch: Placement epoch.
        directory: Where the weights can be read again; empty for what a run began with, None for nowhere.
        placement: Which hosts hold which experts; dead hosts are left out.
    """

    name: str
    epoch: int
    directory: str | None
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorState:
    """State that a coordinator that takes over continues from.

    Attributes:
        wanted: Number of hosts that the job should have.
        versions: Versions that hosts held; the one in use last.
        serial: Serial of the last routing tables.
        leaving: Hosts that were being retired.
        reloads: Number of times that other weights came into use.
    """

    wanted: int
    versions: tuple[PlacedWeights, ...]
    serial: int
    leaving: tuple[str, ...] = ()
    reloads: int = 0

    def to_json(self) -> str:
        """This state as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CoordinatorState:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(
            wanted=values["wanted"],
            serial=values["serial"],
            leaving=tuple(values["leaving"]),
            reloads=values["reloads"],
            versions=tuple(
                PlacedWeights(
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


__all__ = ["CoordinatorState", "PlacedWeights"]
