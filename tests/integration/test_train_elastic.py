"""Training whose hosts, workers and coordinator are killed, and whose hosts come and go: the same trajectory.

The figures that these tests print are in docs/operations.md.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import pytest
from training import STEPS, assert_gone, family, finish, losses, start

from actors.rpc.coordinator_client import AdminClient
from jobs.training.metrics import METRICS_FILE, read_metrics
from model.checkpoints.shards import ShardReader

pytestmark = pytest.mark.timeout(600)
HOST, WORKER, COORDINATOR = "_ExpertHostProcess", "RayTrainWorker", "_CoordinatorProcess"
SETTINGS = {
    "training__steps": STEPS,
    "checkpoint__interval": 0,
    "cluster__expert_hosts": 3,
    "cluster__snapshot_interval": 5,
    "cluster__dead_after": 2.0,
}


class Run:
    """A run in the course of which things happen.

    Attributes:
        pauses: seconds from each disturbance to a step that it made afterwards.
    """

    def __init__(self, corpus: Path, output: Path, *options: str, **changed: object) -> None:
        self.output = output
        self.process = start(corpus, output, *options, **{**SETTINGS, **changed})
        self.pauses: list[float] = []
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def admin(self) -> AdminClient:
        """Of its coordinator."""
        while True:
            found = re.search(r"coordinator at (\S+),", "".join(self._said))
            if found is not None:
                return AdminClient(f"grpc:{found[1]}")
            assert self.process.poll() is None, "".join(self._said)
            time.sleep(0.05)

    def at(self, step: int, disturb: Callable[[], object]) -> None:
        """Disturb it once it has that many steps, and wait until it goes on."""
        while self._steps() < step:
            assert self.process.poll() is None, "".join(self._said)
            time.sleep(0.02)
        began, before = time.monotonic(), self._steps()
        disturb()
        while self._steps() < before + 2:  # one may have been on its way
            assert self.process.poll() is None, "".join(self._said)
            time.sleep(0.01)
        self.pauses.append(time.monotonic() - began)

    def kill(self, title: str, source: random.Random) -> None:
        """SIGKILL for one of its processes of this title, as soon as there is one.

        Of coordinators the oldest one: others stand by.
        """
        while not (found := [p for p in family(self.process) if title in _title(p)]):
            assert self.process.poll() is None, "".join(self._said)
            time.sleep(0.05)
        found.sort(key=lambda p: p.create_time())
        (found[0] if title == COORDINATOR else source.choice(found)).kill()

    def finish(self) -> list[float]:
        """Its losses, step by step."""
        members = family(self.process)
        assert self.process.wait(300) == 0, "".join(self._said)
        self._close()
        assert_gone(members)
        return losses(self.output)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._close()

    def _close(self) -> None:
        self._listener.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line)

    def _steps(self) -> int:
        lines = read_metrics(self.output / METRICS_FILE)
        return int(lines[-1]["step"]) if lines else 0


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


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


def differ(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_whatever_is_killed_the_trajectory_is_the_same(corpus: Path, whole: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    run = Run(corpus, tmp_path / "run")
    try:
        for step, title in ((7, HOST), (19, COORDINATOR), (31, WORKER), (43, HOST)):
            run.at(step, lambda title=title: run.kill(title, source))  # type: ignore[misc]
        got = run.finish()
    finally:
        run.stop()
    print(f"seconds until the next step: {', '.join(f'{s:.1f}' for s in run.pauses)}")
    assert differ(got, losses(whole)) <= 1e-9
    assert apart(run.output, whole) <= 1e-9


@pytest.mark.soak
def test_two_workers_and_replicas_change_no_step(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """One of the workers is killed, and a host that holds no expert alone."""
    source = random.Random(1)
    options = {"training__workers": 2, "cluster__replicas": 2, "cluster__redundant_experts": 2}
    run = Run(corpus, tmp_path / "run", **options)
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
    """Until they have: as many steps as that takes, held against a run of as many with one host."""
    run = Run(corpus, tmp_path / "run", cluster__expert_hosts=1, training__steps=100_000)
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
    calm = Run(corpus, tmp_path / "calm", cluster__expert_hosts=1, training__steps=100_000)
    try:
        calm.at(len(got), lambda: None)
    finally:
        calm.stop()
    expected = [line["main_loss"] for line in read_metrics(calm.output / METRICS_FILE)]
    assert differ(got, expected[: len(got)]) <= 1e-9


@pytest.mark.soak
def test_a_host_that_hangs_is_given_up(corpus: Path, whole: Path, tmp_path: Path) -> None:
    run = Run(corpus, tmp_path / "run")
    try:

        def stop() -> None:
            hung = next(p for p in family(run.process) if HOST in _title(p))
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
    run = Run(corpus, tmp_path / "run", **changed)
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
