"""What all tests share: how they run in this process, and in which order and groups."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from support.soak_parts import soak_part

# A shell starts background jobs with SIGINT ignored, which the processes under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The models are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)

# By default Ray's workers have a lower priority than other processes, and the tests of another process would
# starve them.
os.environ.setdefault("RAY_worker_niceness", "0")

# Modules that take long come first, so that all processes end at about the same time. Modules that share a
# server are in the order that its state asks for: a reload changes its weights, an interrupt ends it.
FIRST = [
    "test_serve_replicas",
    "test_serve_killed",
    "test_serve_elastic",
    "test_reload",
    "test_train",
    "test_train_elastic",
    "test_cli_end_to_end",
    "test_data",
    "test_actors",
    "test_serve",
    "test_serve_grpc",
    "test_serve_front",
    "test_serve_interrupted",
    "test_job_submit",
    "test_sampled_drafts",
    "test_bench_contenders",
    "test_trunk_sharding",
    "test_channels",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-part", metavar="K/N", help="of the tests marked soak only part K of N")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose a part of the soak, and order the modules."""
    _choose_part(config, items)
    items.sort(key=_rank)  # stable


class _ModuleScheduling(LoadScopeScheduling):
    """Deals modules out to the processes; one process runs all tests that start Ray.

    Two Ray clusters at a time starve each other on two cores.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return "ray" if module.startswith("tests/integration/") else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """The scheduler of `-n`."""
    return _ModuleScheduling(config, log)


def _choose_part(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("--soak-part")
    if asked is None:
        return
    part, parts = map(int, asked.split("/"))
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--soak-part {asked}: K is from 1 to N")
    others = [
        item
        for item in items
        if item.get_closest_marker("soak") is not None and soak_part(item.path.stem, parts) != part
    ]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def _rank(item: pytest.Item) -> int:
    name = item.path.stem
    return FIRST.index(name) if name in FIRST else len(FIRST)
