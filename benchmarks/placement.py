"""Compares the placement planner with deepseek-ai/EPLB's algorithm: `python -m benchmarks.placement --json`.

Both get the same loads and the same number of replicas. Balancedness is the mean over the highest load of the
hosts, with each expert's load split evenly among its replicas. There are 120 loads: 100 random ones (uniform,
and log-normal of three widths) and 20 skewed ones (Zipf, and a few experts that take nearly everything).
Planning is timed for 58 layers of 256 experts on 64 hosts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.eplb import eplb_host_loads
from cluster.placement import Site, balancedness, plan

# name -> experts, groups, nodes, hosts, redundant replicas; EPLB wants all of them to divide.
SHAPES = {
    "hierarchical_64_hosts": (256, 8, 8, 64, 64),
    "hierarchical_32_hosts": (256, 8, 4, 32, 32),
    "hierarchical_8_hosts": (64, 8, 2, 8, 8),
    "global_64_hosts": (256, 8, 16, 64, 64),
    "global_24_hosts": (256, 8, 3, 24, 8),
    "global_6_hosts": (32, 4, 3, 6, 4),
}


def sample_loads(n_experts: int, seed: int = 0) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """100 random and 20 skewed loads of one layer (`[E]`), each with the name of its kind."""
    random = np.random.default_rng(seed)
    for at in range(100):
        width = (0.0, 0.3, 1.0, 2.0)[at % 4]
        drawn = random.lognormal(0.0, width, n_experts) if width else random.uniform(0.0, 1.0, n_experts)
        yield "random", drawn
    for at in range(20):
        if at % 4 < 3:
            exponent = (0.6, 1.0, 1.5)[at % 4]
            skewed = random.permutation(np.arange(1, n_experts + 1, dtype=np.float64) ** -exponent)
        else:
            skewed = random.uniform(0.0, 0.01, n_experts)
            skewed[random.choice(n_experts, 1 + at // 4, replace=False)] = random.uniform(
                0.5, 1.0, 1 + at // 4
            )
        yield "skewed", skewed


def compare(shape: str, seed: int = 0) -> dict[str, Any]:
    """Balancedness of both planners over the 120 loads: means by kind, and the lowest ratio to EPLB's."""
    n_experts, n_group, n_nodes, n_hosts, redundant = SHAPES[shape]
    sites = [Site(f"host-{at}", f"node-{at * n_nodes // n_hosts}") for at in range(n_hosts)]
    kinds, samples = zip(*sample_loads(n_experts, seed), strict=True)
    loads = np.stack(samples)
    ours = balancedness(
        plan(
            sites, n_layers=len(loads), n_experts=n_experts, n_group=n_group, redundant=redundant, loads=loads
        ),
        loads,
    ).tolist()
    theirs = []
    for row in loads.tolist():
        hosts = eplb_host_loads(
            row, n_replicas=n_experts + redundant, n_group=n_group, n_nodes=n_nodes, n_hosts=n_hosts
        )
        theirs.append(statistics.mean(hosts) / max(hosts))
    found: dict[str, Any] = {"worst_ratio": min(a / b for a, b in zip(ours, theirs, strict=True))}
    for kind in ("random", "skewed"):
        chosen = [at for at, name in enumerate(kinds) if name == kind]
        found[kind] = {
            "raymoe": statistics.mean(ours[at] for at in chosen),
            "eplb": statistics.mean(theirs[at] for at in chosen),
        }
    found["raymoe"], found["eplb"] = statistics.mean(ours), statistics.mean(theirs)
    return found


def planning_time(repeats: int, width: float, seed: int = 0) -> dict[str, float]:
    """Milliseconds of a plan for 58 layers of 256 experts on 64 hosts with 64 redundant replicas."""
    n_experts, n_group, n_nodes, n_hosts, redundant = SHAPES["hierarchical_64_hosts"]
    sites = [Site(f"host-{at}", f"node-{at * n_nodes // n_hosts}") for at in range(n_hosts)]
    random = np.random.default_rng(seed)
    wall, processor = [], []
    for _ in range(repeats):
        loads = random.lognormal(0.0, width, (58, n_experts))
        start, used = time.perf_counter(), time.thread_time()
        plan(sites, n_layers=58, n_experts=n_experts, n_group=n_group, redundant=redundant, loads=loads)
        wall.append(time.perf_counter() - start)
        processor.append(time.thread_time() - used)
    return {
        "median_ms": 1e3 * statistics.median(wall),
        "least_ms": 1e3 * min(wall),
        "processor_median_ms": 1e3 * statistics.median(processor),
        "processor_least_ms": 1e3 * min(processor),
    }


def main() -> None:
    """Print a table, or with --json one object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeatable; all by default")
    parser.add_argument("--repeats", type=int, default=20, help="plans that are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shapes = {name: compare(name, arguments.seed) for name in arguments.shape or SHAPES}
    times = {
        name: planning_time(arguments.repeats, width, arguments.seed)
        for name, width in (("mild", 0.05), ("random", 0.3), ("skewed", 1.0))
    }
    if arguments.json:
        print(json.dumps({"balancedness": shapes, "planning": times}))
        return
    for name, result in shapes.items():
        print(
            f"{name:<22} raymoe {result['raymoe']:.4f}  EPLB {result['eplb']:.4f}  "
            f"worst ratio {result['worst_ratio']:.4f}"
        )
    for name, result in times.items():
        print(f"planning, {name:<12} " + "  ".join(f"{key} {value:.1f}" for key, value in result.items()))


if __name__ == "__main__":
    main()
