"""The steps of a training run, with fake hosts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from errors import CheckpointError, Interrupted, ProtocolError, RaymoeError
from support.coordinator_run import PLAN, E, L, Run, report


@pytest.fixture
def run() -> Any:
    with Run() as run:
        yield run


def test_all_workers_get_one_decision(run: Run) -> None:
    first = run.report(0, trunk_squared_norm=8.0, local_expert_squared_norm=0.0)
    assert not first.done()
    second = run.report(1, trunk_squared_norm=99.0)  # the same norm as worker 0's: counted once
    decision = first.result(20)
    assert second.result(20) is decision
    assert decision.grad_norm == pytest.approx(math.sqrt(8.0 + 2 * 4.0))
    assert decision.scale == pytest.approx(1.0 / 4.0, rel=1e-5)
    assert decision.learning_rate == pytest.approx(0.5e-2)
    # Loads are 10, 10, 0, 0 with a mean of 5.
    assert torch.equal(decision.bias, torch.tensor([[-1.0, -1.0, 1.0, 1.0]] * L) * 1e-3)
    assert not decision.stop and not decision.checkpoint
    run.end_step(1)
    for host in run.hosts:
        assert host.calls[:2] == [("prepare", 0), ("commit", 0, decision.learning_rate, decision.scale)]


def test_a_repeated_report_gets_the_same_decision_and_changes_nothing(run: Run) -> None:
    decision = run.end_step(0)
    assert run.report(1).result(20) is decision
    bias = run.steps.bias()
    assert torch.equal(bias, decision.bias)
    assert run.steps.step == 1


def test_a_worker_that_asks_twice_within_a_step_is_counted_once(run: Run) -> None:
    twice = [run.report(0), run.report(0)]
    assert not any(future.done() for future in twice)
    decision = run.report(1).result(20)
    assert [future.result(20) for future in twice] == [decision, decision]
    assert run.steps.metrics()[0].max_violation == (1.0, 1.0)


def test_a_wrong_step_names_both(run: Run) -> None:
    with pytest.raises(ProtocolError, match="worker 0 reports step 3, but the run is at step 0"):
        run.steps.report(report(0, 3))
    run.end_step(0)
    run.end_step(1)
    with pytest.raises(ProtocolError, match="reports step 0, but the run is at step 2"):
        run.steps.report(report(0, 0))


def test_unknown_workers_and_misshapen_loads_are_refused(run: Run) -> None:
    with pytest.raises(ProtocolError, match="worker 2 is unknown: the run has 2"):
        run.steps.report(report(2))
    with pytest.raises(ProtocolError, match=r"loads \[2, 3\]"):
        run.steps.report(report(0, loads=torch.zeros(L, 3, dtype=torch.int64)))
    with pytest.raises(ProtocolError, match="float32"):
        run.steps.report(report(0, loads=torch.zeros(L, E)))


def test_workers_go_on_while_hosts_commit_and_the_next_step_waits(run: Run) -> None:
    run.hosts[1].gate.clear()
    run.end_step(0)  # returns although host 1 has not committed
    following = [run.report(0, 1), run.report(1, 1)]
    assert not any(future.done() for future in following)
    assert ("prepare", 1) not in run.hosts[0].calls, "step 1 began before step 0 was committed everywhere"
    run.hosts[1].gate.set()
    assert following[0].result(20).step == 1


def test_a_host_that_does_not_commit_ends_the_run(run: Run) -> None:
    run.hosts[1].gate.clear()
    run.hosts[1].error = RaymoeError("out of memory")
    run.end_step(0)
    waiting = run.report(0, 1)
    run.hosts[1].gate.set()
    with pytest.raises(RaymoeError, match="host-1 did not commit step 0: out of memory"):
        waiting.result(20)
    with pytest.raises(RaymoeError, match="out of memory"):
        run.steps.report(report(1, 1))


def test_a_host_that_does_not_prepare_ends_the_run_before_any_commit(run: Run) -> None:
    def broken(step: int, epoch: int | None = None) -> float:
        raise RaymoeError("hung up")

    run.hosts[1].prepare = broken  # type: ignore[method-assign]
    futures = [run.report(0), run.report(1)]
    for future in futures:
        with pytest.raises(RaymoeError, match="host-1 failed to prepare: hung up"):
            future.result(20)
    assert not any(call[0] == "commit" for host in run.hosts for call in host.calls)


def test_a_failure_wakes_the_waiting(run: Run) -> None:
    waiting = run.report(0)
    run.steps.fail("worker 1 died")
    with pytest.raises(RaymoeError, match="worker 1 died"):
        waiting.result(20)
    assert run.steps.failure == "worker 1 died"


def test_a_gradient_that_is_not_finite_ends_the_run_before_any_commit(run: Run) -> None:
    with pytest.raises(RaymoeError, match="gradient of step 0 is not finite"):
        run.end_step(0, trunk_squared_norm=math.inf)
    assert not any(call[0] == "commit" for host in run.hosts for call in host.calls)


def test_stop_and_checkpoints_come_at_a_boundary() -> None:
    with Run(replace(PLAN, steps=5, checkpoint_interval=2)) as run:
        first = [(d.checkpoint, d.stop) for d in map(run.end_step, range(2))]
        assert first == [(False, False), (True, False)]
        assert run.steps.request_stop() == 2
        last = run.end_step(2)
        assert last.checkpoint and last.stop


def test_the_last_step_stops_with_a_checkpoint() -> None:
    with Run(replace(PLAN, steps=1)) as run:
        decision = run.end_step(0)
        assert decision.checkpoint and decision.stop


def test_save_waits_for_the_commits(run: Run) -> None:
    run.hosts[0].gate.clear()
    run.end_step(0)
    with pytest.raises(ProtocolError, match="after 4 steps was asked for, the run is at 1"):
        run.steps.save("d", 4)
    saving = run.pool.submit(run.steps.save, "d", 1)
    assert not saving.done()
    assert ("save", "d") not in run.hosts[1].calls
    run.hosts[0].gate.set()
    assert len(saving.result(20)) == 2
    assert run.hosts[0].calls[-2:][0][0] == "commit"


def test_a_run_begun_at_a_step_goes_on(run: Run) -> None:
    first = run.end_step(0)
    with Run(step=1, bias=run.steps.bias()) as again:
        assert again.steps.step == 1
        expected, got = run.end_step(1), again.end_step(1)
    assert torch.equal(expected.bias, got.bias)
    assert not torch.equal(first.bias, got.bias)


def test_a_bias_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\[2, 5\]"):
        Run(bias=torch.zeros(L, 5))
    with pytest.raises(CheckpointError, match="bfloat16"):
        Run(bias=torch.zeros(L, E, dtype=torch.bfloat16))


@pytest.mark.parametrize("change", [{"strategy": "none"}, {"update_rate": 0.0}])
def test_other_strategies_leave_the_bias(change: dict[str, Any]) -> None:
    with Run(replace(PLAN, **change)) as run:
        assert not run.end_step(0).bias.any()


def test_without_hosts_the_workers_experts_count_once() -> None:
    with Run(n_hosts=0) as run:
        decision = run.end_step(0, trunk_squared_norm=9.0, local_expert_squared_norm=16.0)
        assert decision.grad_norm == pytest.approx(5.0)


def test_who_has_not_joined_since_the_last_interruption_is_not_counted(run: Run) -> None:
    attempt = run.join(0).attempt  # a restarted process
    assert attempt == 1
    with pytest.raises(Interrupted, match="worker 1 has not joined since"):
        run.steps.report(report(1))
    run.join(1)
    assert run.end_step(0).step == 0


def test_metrics_are_merged_over_workers(run: Run) -> None:
    run.end_step(
        0,
        main_sum=30.0,
        mtp_sum=10.0,
        balance_sum=2.0,
        n_targets=10,
        n_rows=2,
        tokens=12,
        seconds=0.5,
        tokens_routed=20,
        rows_sent=30,
        bytes=7,
    )
    (step,) = run.steps.metrics()
    assert (step.loss, step.mtp_loss, step.balance_loss) == (3.0, 1.0, 1.0)
    assert (step.tokens, step.seconds, step.hosts_per_token, step.bytes) == (24, 0.5, 1.5, 14)
    assert run.steps.metrics(since_step=0) == []
    assert json.loads(json.dumps(step.to_json()))["max_violation"] == [1.0, 1.0]
