"""The Ray session of a command, with Ray's functions replaced."""

from __future__ import annotations

import pytest

from errors import ResourceError
from jobs.fleet.ray_session import ResourceNeeds, ray_session

NEEDS = ResourceNeeds(cpus=1, why="training.workers (1)")


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        (
            None,
            Exception("The node has not started\nmore"),
            "no Ray cluster on this machine: The node has not",
        ),
        (None, Exception(), "on this machine: Exception; --debug says more"),
        ("auto", ConnectionError("nobody there"), "no Ray cluster at auto: nobody there; check --address"),
    ],
)
def test_a_cluster_that_does_not_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, address: str | None, error: Exception, said: str
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(ResourceError) as caught, ray_session(NEEDS, address=address):
        pass
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
