"""Hosts, workers and the coordinator of a training run are lost or change: the trajectory stays the same.

The figures that these tests print are in docs/operations.md.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from statistics import median

import pytest

from jobs.fleet.event_lines import EVENTS_FILE, NOTABLE
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from model.checkpoints.shards import ShardReader
from support.commands.disturbed_run import COORDINATOR, HOST, SETTINGS, WORKER, DisturbedRun, differ, title_of
from support.commands.train import family, finish, losses, start

pytestmark = [pytest.mark.timeout(600), pytest.mark.shares("train")]


def apart(one: Path, other: Path) -> float:
    """Largest difference of two runs' final weights and moments."""
    worst = 0.0
    folders = [sorted((output / "checkpoints").glob("step-*"))[-1] for output in (one, other)]
    tensors = [
        {
            name: reader.tensor(name)
            for reader in map(ShardReader, sorted(folder.glob("*.safetensors")))
            for name in reader.names
        }
        for folder in folders
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        worst = max(worst, float((tensor - tensors[1][name]).abs().max()))
    return worst


def test_whatever_is_killed_the_trajectory_is_the_same(corpus: Path, whole: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    run = DisturbedRun(corpus, tmp_path / "run")
    try:
        for step, title in ((7, HOST), (19, COORDINATOR), (31, WORKER), (43, HOST)):
            run.at(step, lambda title=title: run.kill(title, source))  # type: ignore[misc]
        got = run.finish()
    finally:
        run.stop()
    print(f"seconds until the next step: {', '.join(f'{s:.1f}' for s in run.pauses)}")
    assert differ(got, losses(whole)) <= 1e-9
    assert apart(run.output, whole) <= 1e-9
    happened = [json.loads(line) for line in (run.output / EVENTS_FILE).read_text().splitlines()]
    assert {event["kind"] for event in happened} >= {"died", "interrupted", "resumed", "restarted"}
    for event in happened:
        if event["kind"] in NOTABLE:
            assert f"{event['kind']}: {event['text']}" in run.said


@pytest.mark.soak
def test_two_workers_and_replicas_change_no_step(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """A worker is killed, and a host whose experts all have another replica."""
    source = random.Random(1)
    options = {"training__workers": 2, "cluster__replicas": 2, "cluster__redundant_experts": 2}
    run = DisturbedRun(corpus, tmp_path / "run", **options)
    try:
        for step, title in ((13, WORKER), (37, HOST)):
            run.at(step, lambda title=title: run.kill(title, source))  # type: ignore[misc]
        got = run.finish()
    finally:
        run.stop()
    print(f"seconds until the next step: {', '.join(f'{s:.1f}' for s in run.pauses)}")
    assert differ(got, losses(whole)) <= 1e-9
    assert apart(run.output, whole) <= 1e-9


@pytest.mark.soak
def test_hosts_come_and_go_between_steps(corpus: Path, tmp_path: Path) -> None:
    """The run, ended when the hosts have changed, equals a run of as many steps with one host."""
    run = DisturbedRun(corpus, tmp_path / "run", cluster__expert_hosts=1, training__steps=100_000)
    try:
        admin = run.admin()
        for step, hosts in ((10, 4), (35, 2)):
            run.at(step, lambda hosts=hosts: admin.scale(hosts))  # type: ignore[misc]
        pauses = admin.status()["pauses"]
        admin.close()
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(120) == 0
    finally:
        run.stop()
    print("pauses: " + "; ".join(f"{p['seconds']:.2f} s ({p['why']})" for p in pauses))
    assert len(pauses) >= 2
    got = [line["main_loss"] for line in read_metrics(run.output / METRICS_FILE)]
    calm = DisturbedRun(corpus, tmp_path / "calm", cluster__expert_hosts=1, training__steps=100_000)
    try:
        calm.at(len(got), lambda: None)
    finally:
        calm.stop()
    expected = [line["main_loss"] for line in read_metrics(calm.output / METRICS_FILE)]
    assert differ(got, expected[: len(got)]) <= 1e-9


@pytest.mark.soak
def test_a_host_that_hangs_is_given_up(corpus: Path, whole: Path, tmp_path: Path) -> None:
    run = DisturbedRun(corpus, tmp_path / "run")
    try:

        def stop() -> None:
            hung = next(p for p in family(run.process) if HOST in title_of(p))
            hung.send_signal(signal.SIGSTOP)

        run.at(20, stop)
        got = run.finish()
    finally:
        run.stop()
    print(f"seconds until the next step: {run.pauses[0]:.1f}")
    assert differ(got, losses(whole)) <= 1e-9


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-3)])
def test_ten_kills_in_200_steps(corpus: Path, tmp_path: Path, dtype: str, bound: float) -> None:
    changed = {"training__steps": 200, "training__dtype": dtype}
    calm = tmp_path / "calm"
    finish(start(corpus, calm, **{**SETTINGS, **changed}))
    source = random.Random(4)
    run = DisturbedRun(corpus, tmp_path / "run", **changed)
    steps = sorted(source.sample(range(5, 195), 10))
    try:
        for at, step in enumerate(steps):
            title = (HOST, WORKER, COORDINATOR)[at % 3]
            run.at(step, lambda title=title: run.kill(title, source))  # type: ignore[misc]
            print(f"step {step}: {title} killed, next step after {run.pauses[-1]:.2f} s", flush=True)
        assert run.process.wait(300) == 0
    finally:
        run.stop()
    print(f"median {median(run.pauses):.2f} s")
    lines = [read_metrics(output / METRICS_FILE) for output in (run.output, calm)]
    assert [line["step"] for line in lines[0]] == list(range(1, 201))
    assert differ(*([line["main_loss"] for line in part] for part in lines)) <= bound
    assert apart(run.output, calm) <= bound
