"""`raymoe reload`: which of several served models it takes, and what it says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from errors import ResourceError
from jobs.cli.app import app
from jobs.tools.jobs_found import HERE, JobsFound, RunningJob

with warnings.catch_warnings():  # Ray Serve's own
    warnings.simplefilter("ignore")
    from jobs.tools import served_models

A, B, C = "10.0.0.1:6379", "10.0.0.1:6380", "10.0.0.1:6381"
ALPHA = RunningJob(coordinator="grpc:h:1", id="1a", name="alpha", cluster=A, doing="serves the weights x")
BETA = RunningJob(coordinator="grpc:h:2", id="2b", name="beta", cluster=B, doing="serves the weights y")
DONE = {"version": "new", "previous": "x", "replicas": 1, "expert_hosts": 2, "seconds": 0.5}


@dataclass
class FakeClusters:
    """Ray clusters of this machine: what is served on each, and what was reloaded.

    Attributes:
        served: Address -> application -> its job; None for a model without a coordinator.
        jobs: The jobs with a coordinator that a command finds.
        reloaded: Cluster and application of every reload.
        silent: Address of a cluster that does not answer.
    """

    served: dict[str, dict[str, RunningJob | None]]
    jobs: list[RunningJob]
    reloaded: list[tuple[str, str]] = field(default_factory=list)
    joined: str = ""
    silent: str = ""

    @property
    def gcs_address(self) -> str:
        return self.joined

    @contextmanager
    def on_cluster(self, address: str | None, *, debug: bool) -> Iterator[str]:
        self.joined = address or next(iter(self.served))
        yield self.joined

    def fit_cluster(self, address: str) -> None:
        if address == self.silent:
            raise ResourceError("it does not answer")

    def living_actors(self, address: str) -> list[str]:
        names = [
            f"SERVE_REPLICA::{name}#{part}#x1" for name in self.served[address] for part in ("experts", "api")
        ]
        return ["SERVE_CONTROLLER_ACTOR", "SERVE_REPLICA::other#model#x2", *names]

    def coordinator_of(self, application: str) -> str | None:
        job = self.served[self.joined][application]
        return None if job is None else job.coordinator

    def described(self, at: str, known: RunningJob) -> RunningJob:
        return next(job for job in self.jobs if job.coordinator == at)

    def reload(self, directory: Path, *, application: str) -> dict[str, Any]:
        self.reloaded.append((self.joined, application))
        return DONE


def clusters(monkeypatch: pytest.MonkeyPatch, **served: Any) -> FakeClusters:
    fake = FakeClusters(
        {{"a": A, "b": B, "c": C}[at]: applications for at, applications in served.items()}, [ALPHA, BETA]
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(served_models, "find_weights", Path)
    monkeypatch.setattr(served_models, "local_addresses", lambda: list(fake.served))
    monkeypatch.setattr(served_models, "fit_cluster", fake.fit_cluster)
    monkeypatch.setattr(served_models, "find_jobs", lambda **_: JobsFound(fake.jobs, HERE))
    monkeypatch.setattr(served_models.ray, "get_runtime_context", lambda: fake)
    monkeypatch.setattr(
        served_models, "served_applications", lambda: dict.fromkeys(fake.served[fake.joined], "")
    )
    for name in ("on_cluster", "living_actors", "coordinator_of", "described", "reload"):
        monkeypatch.setattr(served_models, name, getattr(fake, name))
    return fake


def reload(*options: str) -> Result:
    return CliRunner().invoke(app, ["reload", "new", *options])


def test_the_only_model_is_reloaded_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = clusters(monkeypatch, a={"raymoe": ALPHA})
    done = reload()
    assert (done.exit_code, done.stderr) == (0, f"reloads alpha (1a, Ray cluster {A})\n")
    assert done.stdout == "new in place of x, on 1 replicas and 2 expert hosts, in 0.5 s\n"
    assert fake.reloaded == [(A, "raymoe")]


def test_of_several_clusters_with_models_none_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = clusters(monkeypatch, a={"raymoe": ALPHA}, b={"raymoe": BETA}, c={"raymoe": None})
    result = reload()
    assert result.exit_code == 2
    said = result.stderr.splitlines()
    assert said[0] == "error: 3 jobs run on this machine; say which with --job NAME or ID"
    assert "alpha   1a" in said[1] and "beta    2b" in said[2]
    assert "raymoe  10.0.0.1:6381  serves, without expert hosts" in said[3]
    assert fake.reloaded == []


@pytest.mark.parametrize(
    ("named", "cluster", "label"),
    [
        ("beta", B, f"beta (2b, Ray cluster {B})"),
        ("2b", B, f"beta (2b, Ray cluster {B})"),
        ("raymoe", C, f"raymoe (Ray cluster {C})"),
        (C, C, f"raymoe (Ray cluster {C})"),
    ],
)
def test_a_model_is_chosen_by_name_or_id(
    monkeypatch: pytest.MonkeyPatch, named: str, cluster: str, label: str
) -> None:
    fake = clusters(monkeypatch, a={"raymoe": ALPHA}, b={"raymoe": BETA}, c={"raymoe": None})
    done = reload("--job", named, "--json")
    assert (done.exit_code, done.stderr) == (0, f"reloads {label}\n")
    assert json.loads(done.stdout)["job"]["cluster"] == cluster
    assert fake.reloaded == [(cluster, "raymoe")]


def test_a_cluster_that_trains_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = clusters(monkeypatch, a={}, b={"raymoe": BETA})
    fake.jobs[0] = RunningJob(
        coordinator="grpc:h:1", id="1a", name="run", cluster=A, doing="trains, at step 3 of 9"
    )
    assert reload().exit_code == 0
    assert fake.reloaded == [(B, "raymoe")]
    fake.silent = B
    assert "none of them serves a model" in reload().stderr
    none = clusters(monkeypatch, a={}, b={})
    assert "2 Ray clusters run on this machine, and none of them serves a model" in reload().stderr
    assert none.reloaded == []


@pytest.mark.parametrize(
    "options", [("--job", "beta"), ("--app", "second"), ("--app", "second", "--job", "2b")]
)
def test_of_several_models_of_a_cluster_one_has_to_be_named(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    fake = clusters(monkeypatch, a={"first": ALPHA, "second": BETA})
    asked = reload("--address", A)
    assert asked.exit_code == 2
    assert asked.stderr.startswith(f"error: 2 jobs run on the Ray cluster at {A}; say which with --job")
    assert fake.reloaded == []
    assert reload("--address", A, *options).exit_code == 0
    assert fake.reloaded == [(A, "second")]


def test_an_application_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters(monkeypatch, a={"raymoe": ALPHA})
    result = reload("--app", "other")
    assert result.exit_code == 2
    assert f"the Serve application 'other' is not there on the Ray cluster at {A}" in result.stderr
    clusters(monkeypatch, a={})
    assert f"no model is served on the Ray cluster at {A}" in reload().stderr
