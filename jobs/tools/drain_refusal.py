"""Which Ray nodes `raymoe drain --node` refuses, because a deployment or a run would end with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from actors.messages.job_identity import COORDINATOR
from jobs.serving.names import INTERFACE, POOL

_HEAD: Final = "node:__internal_head__"
"""A resource that Ray's head node alone has."""

_PARTS: Final = {POOL: "pool", INTERFACE: "interface"}
"""What each deployment of Ray Serve that stays on the head node is called."""

_REPLICA: Final = re.compile(rf"ServeReplica:(.*):({'|'.join(_PARTS)})")


def refusal(node: str, nodes: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a node must not be drained; None if it may be.

    Args:
        node: Full id of the node.
        nodes: All nodes of the Ray cluster, as Ray describes them.
        known: All actors of the Ray cluster, as Ray describes them.
    """
    alive = [one for one in nodes if one["Alive"]]
    stay = _staying(
        [actor for actor in known if actor["State"] == "ALIVE" and actor["Address"]["NodeID"] == node]
    )
    if len(alive) == 1:
        holds = f" and holds {stay}" if stay else ""
        return (
            f"node {node} is the cluster's only node{holds}: nothing can move elsewhere; start a second node "
            "and drain that one when it has to go, or end the deployment or training run"
        )
    head = any(one["NodeID"] == node and _HEAD in one["Resources"] for one in alive)
    if head and stay:
        return (
            f"node {node} is the head node and holds {stay}, which end with it; drain another node, or end "
            "the deployment or training run"
        )
    return None


def _staying(here: Sequence[Mapping[str, Any]]) -> str:
    """The parts of deployments and runs on a node that Ray does not move; empty if there are none."""
    found: dict[str, set[str]] = {}
    for actor in here:
        if part := _REPLICA.fullmatch(actor["ActorClassName"]):
            found.setdefault(part[1], set()).add(part[2])
    said = [
        f"the {' and '.join(word for name, word in _PARTS.items() if name in parts)} of {application}"
        for application, parts in sorted(found.items())
    ]
    if any(actor["Name"].startswith(COORDINATOR) for actor in here):
        said.append("a job's coordinator")
    return " and ".join(said)


__all__ = ["refusal"]
