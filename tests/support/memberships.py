"""Memberships of expert hosts, and what tests ask of them."""

from __future__ import annotations

from cluster.membership import Membership, Stage
from cluster.topology import HostInfo


def info(at: int | str) -> HostInfo:
    return HostInfo(id=f"host-{at}" if isinstance(at, int) else at, node="node")


def membership(n: int, *, most: int = 8, wanted: int | None = None) -> Membership:
    """A membership with so many hosts that hold experts."""
    made = Membership(wanted=n if wanted is None else wanted, most=most)
    for at in range(n):
        made.register(info(at), 0.0)
    made.placed([f"host-{at}" for at in range(n)], 0.0)
    return made


def settle(made: Membership, now: float) -> None:
    """Report that experts are where they should be."""
    made.placed([site.id for site in made.sites()], now)


def stages(made: Membership) -> dict[str, Stage]:
    return {id: member.stage for id, member in made.members.items()}


def kinds(made: Membership) -> list[str]:
    return [event.kind for event in made.events]


__all__ = ["info", "kinds", "membership", "settle", "stages"]
