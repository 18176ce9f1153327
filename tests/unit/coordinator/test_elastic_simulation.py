"""A thousand random operations on a simulated cluster keep the invariants of placement."""

from __future__ import annotations

import pytest

from errors import ConfigError, ResourceError
from support.elastic_simulation import EXPERTS, Simulation

OPERATIONS = 250


def operate(cluster: Simulation) -> str:
    """Do one operation, or cause one fault."""
    random = cluster.random
    alive = cluster.alive()
    kind = random.choices(
        ["scale", "drain", "replace", "kill", "hang", "kill all", "refused"], [8, 3, 3, 3, 1, 0.3, 1]
    )[0]
    if kind in ("scale", "drain", "replace"):
        cluster.fail_next = random.choice([0, 0, 0, 1, 2])
        cluster.die_next = random.choice([0, 0, 0, 1])
    roster, wanted = cluster.roster, cluster.membership.wanted
    try:
        if kind == "scale":
            roster.scale(random.randint(1, 7))
        elif kind in ("drain", "replace") and alive:
            roster.drain(random.choice(alive), replace=kind == "replace")
        elif kind == "refused":
            roster.scale(random.choice([0, EXPERTS + 1]))
            raise AssertionError("so many cannot be")
        elif kind == "kill" and alive:
            cluster.world[random.choice(alive)].dead = True
        elif kind == "hang" and alive:
            cluster.world[random.choice(alive)].hung = True
        elif kind == "kill all":
            for id in alive:
                cluster.world[id].dead = True
    except (ConfigError, ResourceError):
        assert cluster.membership.wanted == wanted, "what was refused has changed something"
    return kind


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_thousand_operations_keep_every_invariant(replicas: int, seed: int) -> None:
    cluster = Simulation(10 * seed + replicas, replicas=replicas)
    given_up = 0
    for _ in range(OPERATIONS):
        operate(cluster)
        if cluster.random.random() < 0.4:  # the next one comes before this one is done
            for _ in range(cluster.random.randint(0, 4)):
                cluster.tick()
            operate(cluster)
        scaling = cluster.membership.scaling
        cluster.settle()
        cluster.check_settled()
        if scaling is not None and scaling is cluster.membership.scaling:
            assert cluster.membership.wanted == (
                scaling.target if scaling.failure is None else scaling.before
            )
            given_up += scaling.failure is not None
    assert given_up > OPERATIONS // 20
    assert cluster.moved <= cluster.least * (1.0 if replicas == 1 else 1.35), (cluster.moved, cluster.least)
