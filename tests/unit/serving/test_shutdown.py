"""The end of a deployment, with Serve's functions replaced."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's use of pydantic
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import ApplicationStatus

    from jobs.serving import shutdown
    from jobs.serving.shutdown import request_deletion, take_down


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Serve is asked for. The drain of the application waits until a second Ctrl-C."""
    made: list[Any] = []
    overview = SimpleNamespace(status=ApplicationStatus.RUNNING)

    def result(**_: float) -> None:
        made.append("drain")
        raise KeyboardInterrupt

    close = SimpleNamespace(remote=lambda: SimpleNamespace(result=result))
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={"alpha": overview}))
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: SimpleNamespace(close=close))
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking=True: made.append((name, _blocking)))
    monkeypatch.setattr("ray.serve.shutdown", lambda: made.append("shutdown"))
    monkeypatch.setattr(shutdown, "_end_proxies", lambda: made.append("proxies"))
    return made


@pytest.mark.parametrize(("whole", "left"), [(False, [("alpha", False)]), (True, [])])
def test_a_second_interrupt_still_deletes_the_application(
    calls: list[Any], whole: bool, left: list[Any]
) -> None:
    """On a cluster that stays; another ends with the command."""
    with pytest.raises(KeyboardInterrupt):
        take_down("alpha", whole=whole)
    assert calls == ["drain", *left]


def test_a_drain_that_fails_is_told_and_the_rest_ends(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_handle(*_: str) -> None:
        raise RayServeException("the pool is gone\nand more")

    monkeypatch.setattr("ray.serve.get_deployment_handle", no_handle)
    take_down("alpha", whole=True)
    assert calls == ["proxies", "shutdown"]
    assert capsys.readouterr().err == "requests in progress may be cut off (the pool is gone)\n"


def test_without_a_controller_there_is_nothing_to_delete(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the error that ended a deployment is not hidden by another one."""

    def delete(name: str, _blocking: bool) -> None:
        calls.append(name)
        raise RayServeException("There is no Serve instance running on this Ray cluster.")

    monkeypatch.setattr("ray.serve.delete", delete)
    request_deletion("alpha")
    assert calls == ["alpha"]
