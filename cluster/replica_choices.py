"""Complete selections of one holder per expert, which tokens use in turn."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cluster.topology import Holders

MOST_CHOICES = 12
"""Enough to split load evenly among 1, 2, 3, 4 or 6 replicas."""


def replica_choices(holders: Holders, n_hosts: int) -> NDArray[np.int64]:
    """Choices of one replica for each expert, which split the load evenly when tokens use them in turn.

    Experts with the same primary stay together in every choice as far as they have the same holders, so that
    a token touches as few hosts as with the primaries. Choice 0 is the primaries.

    Args:
        holders: `[L][E]` holders of every expert.
        n_hosts: Number of hosts that `holders` points into.

    Returns:
        `[R, L, E]` host indices, -1 for an expert without a holder. R is 1 when no expert has two holders,
        otherwise the number, at most `MOST_CHOICES`, that splits the load best.

    Raises:
        ValueError: A holder is not below `n_hosts`, or `holders` is not rectangular.
    """
    counts = Counter(len(hosts) for row in holders for hosts in row)
    n_choices = _choices(counts)
    chosen: list[list[tuple[int, ...]]] = []
    for row in holders:
        alike: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
        for hosts in row:
            if hosts:
                alike[hosts[0]][hosts] += 1
        # Experts of one primary follow the choices of their most common set of hosts where they can.
        lead = {
            primary: _follow((), max(sets, key=lambda hosts: (sets[hosts], hosts)), n_choices)
            for primary, sets in alike.items()
        }
        none = (-1,) * n_choices
        chosen.append([_follow(lead[hosts[0]], hosts, n_choices) if hosts else none for hosts in row])
    n_experts = len(holders[0]) if holders else 0
    table = np.array(chosen, dtype=np.int64).reshape(len(holders), n_experts, n_choices)
    if table.size and table.max() >= n_hosts:
        raise ValueError(f"holders name host {table.max()}, but there are {n_hosts} hosts")
    return np.ascontiguousarray(table.transpose(2, 0, 1))


def _choices(counts: Counter[int]) -> int:
    """The least number of choices that splits the load best.

    Args:
        counts: Number of replicas -> number of experts with so many.
    """
    if max(counts, default=0) < 2:
        return 1

    def unevenness(n: int) -> float:
        # The busiest replica of c answers ceil(n / c) of n choices; c / n times that is 1 when even.
        return round(sum(many * -(-n // c) * c / n for c, many in counts.items() if c), 9)

    return min(range(2, MOST_CHOICES + 1), key=unevenness)


@lru_cache(maxsize=4096)
def _follow(lead: Sequence[int], hosts: tuple[int, ...], n_choices: int) -> tuple[int, ...]:
    """A host for each choice: the one in `lead` where possible, and every host equally often."""
    each, more = divmod(n_choices, len(hosts))
    # Which host is chosen once more differs with the primary, so that low ranks are not all busier.
    first = hosts[0] if each else 0
    left = {host: each + ((rank - first) % len(hosts) < more) for rank, host in enumerate(hosts)}
    found = [-1] * n_choices
    for choice, host in enumerate(lead):
        if left.get(host, 0):
            found[choice] = host
            left[host] -= 1
    rank = 0
    for choice, host in enumerate(found):
        if host < 0:
            while not left[hosts[rank % len(hosts)]]:
                rank += 1
            found[choice] = hosts[rank % len(hosts)]
            left[found[choice]] -= 1
            rank += 1
    return tuple(found)


__all__ = ["MOST_CHOICES", "replica_choices"]
