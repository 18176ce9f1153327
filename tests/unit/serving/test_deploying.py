"""What `raymoe serve` says and does while Ray Serve deploys a model, with Serve's functions replaced."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from errors import ResourceError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's use of pydantic
    from ray.serve.schema import ApplicationStatus

    from jobs.serving import deploying
    from jobs.serving.deploying import deploy, start_serve, waited_for

PARTS = ("experts", "trunk", "api")


def _overview(status: ApplicationStatus, states: dict[str, dict[str, int]], message: str = "") -> Any:
    parts = {name: SimpleNamespace(replica_states=counts, message=message) for name, counts in states.items()}
    return SimpleNamespace(status=status, deployments=parts, message="")


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The statuses that Serve reports, one for each question; an error is raised."""
    told: list[Any] = []

    def status() -> Any:
        found = told.pop(0)
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(applications={} if found is None else {"raymoe": found})

    tries = [TimeoutError("Proxies not available after 60s."), None]

    def proxies() -> None:
        if (error := tries.pop(0)) is not None:
            raise error

    monkeypatch.setattr("ray.serve.run_many", lambda *_, **__: None)
    monkeypatch.setattr("ray.serve.status", status)
    monkeypatch.setattr(
        deploying, "_get_global_client", lambda: SimpleNamespace(wait_for_proxies_serving=proxies)
    )
    monkeypatch.setattr(deploying, "_POLL_SECONDS", 0.0)
    yield told
    assert not told


def test_every_part_is_named_until_it_is_ready(statuses: list[Any]) -> None:
    starting = {"experts": {"STARTING": 1}, "trunk": {"STARTING": 2}, "api": {"STARTING": 1}}
    hosts = {**starting, "experts": {"RUNNING": 1}}
    trunk = {**hosts, "trunk": {"RUNNING": 1, "STARTING": 1}}
    ready = {part: {"RUNNING": 1} for part in PARTS}
    deployed = [_overview(ApplicationStatus.DEPLOYING, states) for states in (starting, hosts, hosts, trunk)]
    statuses[:] = [None, TimeoutError(), *deployed, _overview(ApplicationStatus.RUNNING, ready)]
    told: list[str] = []
    deploy(None, name="raymoe", tell=told.append)
    assert told == [
        "waiting for coordinator and expert hosts, trunk replicas (0 of 2), interface",
        "waiting for trunk replicas (0 of 2), interface",
        "waiting for trunk replicas (1 of 2), interface",
    ]
    assert waited_for({part: {"RUNNING": 1} for part in PARTS}) == ""


def test_a_part_that_fails_ends_the_wait_with_its_error(statuses: list[Any]) -> None:
    told = "Traceback (most recent call last):\nray::Replica:\nerrors.ConfigError: cache_tokens is too small"
    statuses[:] = [_overview(ApplicationStatus.DEPLOY_FAILED, {"trunk": {}}, told)]
    with pytest.raises(ResourceError, match=r"could not be deployed: cache_tokens is too small$"):
        deploy(None, name="raymoe", tell=lambda _: None)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs only while something is waited for: a second for each poll."""
    now = [0.0]

    def sleep(_: float) -> None:
        now[0] += 1.0

    monkeypatch.setattr(deploying, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize(
    ("before", "then", "said"),
    [
        ("DEPLOYING", None, "the Serve application 'raymoe' was deleted meanwhile; start it again"),
        ("DEPLOYING", "DELETING", "the Serve application 'raymoe' was deleted meanwhile; start it again"),
        (None, None, "the Serve application 'raymoe' is not known to Ray Serve; start it again"),
        ("DEPLOYING", ActorDiedError(), "Ray Serve has ended meanwhile; start the command again"),
    ],
)
def test_an_application_that_is_gone_is_given_up(
    statuses: list[Any], before: str | None, then: str | ActorDiedError | None, said: str
) -> None:
    first, rest = (
        _overview(ApplicationStatus(one), {"trunk": {"STARTING": 1}}) if isinstance(one, str) else one
        for one in (before, then)
    )
    statuses[:] = [first, *[rest] * 9, first, *[rest] * 12]  # it was back after 9 seconds
    if before is None:
        del statuses[12:]
    with pytest.raises(ResourceError) as caught:
        deploy(None, name="raymoe", tell=lambda _: None)
    assert str(caught.value) == said


@pytest.mark.usefixtures("seconds")
def test_a_controller_that_does_not_answer_is_told_and_waited_for(statuses: list[Any]) -> None:
    ready = _overview(ApplicationStatus.RUNNING, {part: {"RUNNING": 1} for part in PARTS})
    statuses[:] = [ActorUnavailableError("restarts", None)] * 12 + [TimeoutError()] * 13 + [ready]
    told: list[str] = []
    deploy(None, name="raymoe", tell=told.append)
    assert [line.partition(" (load")[0] for line in told] == ["waiting for Ray Serve's controller"] * 2


def test_serve_is_started_again_when_its_proxies_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def start(**options: Any) -> None:
        calls.append(options)
        if len(calls) < 3:
            raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr("ray.serve.start", start)
    start_serve(lambda _: None, proxy_location="HeadOnly")
    assert calls == [{"proxy_location": "HeadOnly"}] * 3

    def never(**options: Any) -> None:
        raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr("ray.serve.start", never)
    with pytest.raises(ResourceError, match=r"HTTP proxies not available after 60s. \(load .* try again"):
        start_serve(lambda _: None)
