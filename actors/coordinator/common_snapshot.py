"""The newest step that a run can go back to: everything of it is in some live host's memory. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.messages.transfer_orders import EXPERTS, StoredCopy
from actors.messages.trunk_parts import TRUNK, complete

DECISIONS = "decisions"
"""Name of the coordinator's blob in hosts' memory, beside the hosts' experts and the workers' trunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonSnapshot:
    """A step that a run can go back to.

    Attributes:
        step: Optimizer steps behind it.
        sources: `[L][E]` -> hosts that have the expert's state in memory.
        trunk: Hosts that have the trunk, or parts that together make one.
        decisions: Hosts that have the coordinator's blob.
    """

    step: int
    sources: tuple[tuple[tuple[str, ...], ...], ...]
    trunk: tuple[str, ...]
    decisions: tuple[str, ...]


def newest_common(
    inventories: Mapping[str, Sequence[StoredCopy]], *, layers: Sequence[int], n_experts: int
) -> CommonSnapshot | None:
    """The newest step of which all experts, the trunk and the decisions are in memory; None without one.

    Args:
        inventories: Host id -> what the host keeps in memory, for every live host.
        layers: Model layer index of each row.
        n_experts: Routed experts of a layer.
    """
    steps = {stored.step for entries in inventories.values() for stored in entries}
    for step in sorted(steps, reverse=True):
        found = _common(step, inventories, layers, n_experts)
        if found is not None:
            return found
    return None


def _common(
    step: int, inventories: Mapping[str, Sequence[StoredCopy]], layers: Sequence[int], n_experts: int
) -> CommonSnapshot | None:
    rows = {layer: [set[str]() for _ in range(n_experts)] for layer in layers}
    decisions: list[str] = []
    trunk: dict[str, list[str]] = {}
    for host, entries in inventories.items():
        for stored in entries:
            if stored.step != step:
                continue
            if stored.kind == EXPERTS:
                for layer, experts in stored.experts.items():
                    for expert in experts:
                        rows[layer][expert].add(host)
            elif stored.kind == DECISIONS:
                decisions.append(host)
            else:
                trunk.setdefault(stored.kind, []).append(host)
    parts = complete(trunk)
    if not all(hosts for row in rows.values() for hosts in row) or not decisions or not parts:
        return None
    return CommonSnapshot(
        step=step,
        sources=tuple(tuple(tuple(sorted(hosts)) for hosts in rows[layer]) for layer in layers),
        trunk=tuple(sorted({host for part in parts for host in trunk[part]})),
        decisions=tuple(sorted(decisions)),
    )


def buddies(hosts: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Host id -> host that keeps a copy of its state: the next one on another node, else the next one.

    A single host has no buddy.

    Args:
        hosts: Id and node of each host.
    """
    found: dict[str, str] = {}
    for at, (id, node) in enumerate(hosts):
        others = [hosts[(at + step) % len(hosts)] for step in range(1, len(hosts))]
        elsewhere = [other for other, where in others if where != node]
        if others:
            found[id] = elsewhere[0] if elsewhere else others[0][0]
    return found


__all__ = ["DECISIONS", "TRUNK", "CommonSnapshot", "buddies", "newest_common"]
