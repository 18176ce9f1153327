"""The states of a training run, without hosts and without threads."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import pytest
import torch

from actors.coordinator.run_state import RestartPoint, RunState, RunStatus, StepReports
from actors.messages.steps import StepReport
from errors import ChannelError, Interrupted, ProtocolError, RaymoeError

BIAS = torch.zeros(1, 2)


class Run:
    """A state, and the reasons of its interruptions."""

    def __init__(self, workers: int = 1) -> None:
        self.reasons: list[str] = []
        self.state = RunState(workers=workers, step=3, bias=BIAS, on_interrupted=self.reasons.append)

    def recover(self, step: int = 2) -> bool:
        assert self.state.begin_recovery()
        return self.state.resume(RestartPoint(step=step, bias=BIAS), "lost", 0.5)

    def report(self, worker: int = 0, step: int = 3) -> object:
        return self.state.add_report(StepReport(worker=worker, step=step, loads=torch.zeros(1, 2)))


def test_an_interruption_begins_an_attempt_and_a_recovery_ends_it() -> None:
    run = Run()
    assert run.state.join(0, 1, -1, "", 20).step == 3
    run.state.interrupt("host-1 is lost")
    assert (run.state.status, run.state.attempt) == (RunStatus.INTERRUPTED, 1)
    run.state.interrupt("host-2 is lost")  # the recovery takes it into account
    assert run.reasons == ["host-1 is lost"]
    with pytest.raises(Interrupted, match="host-1 is lost"):
        run.report()
    with pytest.raises(Interrupted, match="join again"):
        run.state.join(0, 1, 0, "", 0.0)
    assert run.recover()
    assert run.state.status is RunStatus.RUNNING
    assert list(run.state.pauses) == [("lost", 0.5)]
    with pytest.raises(Interrupted, match="is being done again"):
        run.state.require_running(0)
    resume = run.state.join(0, 1, 0, "", 20)
    assert (resume.attempt, resume.step) == (1, 2)
    assert isinstance(run.report(step=2), StepReports)


def test_a_loss_of_an_earlier_attempt_changes_nothing() -> None:
    run = Run()
    run.state.interrupt("lost")
    run.recover()
    run.state.interrupt("late", attempt=0)
    run.state.host_failed("late", ChannelError("lost"), 0)
    assert run.state.status is RunStatus.RUNNING


def test_a_run_that_is_held_waits_for_its_recovery() -> None:
    run = Run()
    run.state.hold("the coordinator was restarted")
    assert (run.state.status, run.state.attempt) == (RunStatus.STARTING, 1)
    run.state.interrupt("host-1 is lost")
    assert run.reasons == []
    with pytest.raises(Interrupted, match="join again"):
        run.state.join(0, 1, 0, "", 0.0)
    assert run.recover(5)
    assert run.state.join(0, 1, 0, "", 20).step == 5


def test_nothing_follows_the_end() -> None:
    run = Run()
    run.state.host_failed("host-0 has no memory", RaymoeError("no memory"), 0)
    assert run.state.failure == "host-0 has no memory"
    run.state.end("another reason")
    run.state.interrupt("host-1 is lost")
    run.state.hold("the coordinator was restarted")
    assert not run.state.begin_recovery()
    assert not run.state.resume(RestartPoint(step=2, bias=BIAS), "lost", 0.5)
    with pytest.raises(RaymoeError, match="host-0 has no memory"):
        run.report()
    with pytest.raises(RaymoeError, match="host-0 has no memory"):
        run.state.join(0, 1, -1, "", 20)


def test_a_run_that_is_interrupted_again_and_again_ends() -> None:
    run = Run()
    for _ in range(5):
        run.state.interrupt("lost")
        run.recover()
    run.state.interrupt("lost")
    assert run.state.failure == "interrupted 6 times without a step in between, at last: lost"
    assert len(run.reasons) == 5


def test_only_the_last_report_of_a_step_gets_all_reports() -> None:
    run = Run(workers=2)
    for rank in range(2):
        run.state.join(rank, 2, -1, "", 20)
    with pytest.raises(ProtocolError, match="reports step 4, but the run is at step 3"):
        run.report(step=4)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(run.report, rank) for rank in range(2)]
        done, waiting = wait(calls, 20, return_when=FIRST_COMPLETED)
        (found,) = [call.result() for call in done]
        assert isinstance(found, StepReports)
        assert [report.worker for report in found.reports] == [0, 1]
        run.state.end("enough")
        for call in waiting:
            with pytest.raises(RaymoeError, match="enough"):
                call.result(20)
