"""What a coordinator hands to its successor: the weights that hosts hold, and the number of hosts wanted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from cluster.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWeights:
    """Weights under one epoch.

    Attributes:
        name: of the weights; empty in training.
        directory: where they can be read again; empty for the beginning of a run, None for nowhere.
        placement: who holds them; hosts that died are left out.
    """

    name: str
    epoch: int
    directory: str | None
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorState:
    """What a coordinator that takes over begins with.

    Attributes:
        wanted: hosts that there should be.
        versions: what hosts held, as far as was known.
        leaving: hosts that were to go.
    """

    wanted: int
    versions: tuple[PlacedWeights, ...]
    serial: int
    leaving: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CoordinatorState:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(
            wanted=values["wanted"],
            serial=values["serial"],
            leaving=tuple(values["leaving"]),
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
