"""The work that the benchmarks of training and overlap measure is really done."""

from __future__ import annotations

import os
from functools import partial

import pytest

from benchmarks import overlap
from benchmarks.contenders import Build, Contender
from benchmarks.training_steps import ours
from errors import ConfigError
from jobs.config.presets import preset
from jobs.config.run_config import RunConfig

pytestmark = pytest.mark.slow


def tiny(hosts: int) -> RunConfig:
    values = preset("tiny").to_dict()
    values["model"]["num_nextn_predict_layers"] = 0
    values["cluster"]["expert_hosts"] = hosts
    return RunConfig.from_dict(values)


@pytest.mark.timeout(120)
def test_training_steps() -> None:
    with Contender("ours", ours, tiny(0)) as contender:
        assert all(seconds > 0 for seconds in contender.steps(2))


def test_a_channel_within_a_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="--channel 'local' is none of auto"):
        overlap.bench_overlap(channel="local", rounds=1)


@pytest.mark.timeout(120)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="trunk and hosts take a core each")
@pytest.mark.parametrize(
    ("work", "weigh"),
    [(overlap.training, True), (partial(overlap.decode, sequences=64), False)],
    ids=["training", "decode"],
)
def test_overlap(work: Build, weigh: bool) -> None:
    build: Build = partial(work, overlap=True, weigh=weigh)
    with Contender("overlap", build, tiny(2)) as contender:
        (figure,) = contender.steps(1)
        assert figure > 0
