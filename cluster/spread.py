"""How the load of an expert splits among its replicas: complete choices that tokens take in turns."""

from __future__ import annotations

from math import lcm
from typing import Final

from cluster.topology import Holders

MOST: Final = 12
"""Choices at most: all of up to four replicas come up equally often."""


def spread(holders: Holders, n_hosts: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """[R][L][E]: R complete choices of one replica of every expert, as indices of hosts; -1 where none is.

    Choice r takes an expert's replica of rank r, so that a group's experts stay together where their
    replicas of one rank lie on one host. Without replicas R is 1.
    """
    counts = {len(hosts) for row in holders for hosts in row if hosts}
    ways = min(lcm(*counts), MOST)
    return tuple(
        tuple(tuple(hosts[way % len(hosts)] if hosts else -1 for hosts in row) for row in holders)
        for way in range(ways)
    )


__all__ = ["MOST", "spread"]
