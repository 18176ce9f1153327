"""A run loses hosts, workers and its coordinator, with fake hosts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.messages.coordinator_state import CoordinatorState
from errors import ChannelError, Interrupted, RaymoeError
from support.coordinator_run import PLAN, E, L, Run, report
from support.fakes.fake_hosts import FakeHost
from support.waiting import wait_until

KEEPS = replace(PLAN, snapshot_interval=2)


def held(run: Run) -> dict[str, Any]:
    """The experts that hosts hold in the published epoch; asserts that the table agrees."""
    table = run.steps.table()
    found = {}
    for at, info in enumerate(table.hosts):
        host = run.world[info.id]
        found[info.id] = host.held[table.epoch]
        for layer, row in enumerate(table.holders):
            experts = tuple(expert for expert, hosts in enumerate(row) if at in hosts)
            assert host.held[table.epoch].get(layer, ()) == experts
    assert all(hosts for row in table.holders for hosts in row)
    return found


def copied(run: Run, step: int) -> bool:
    """Whether all hosts have the experts' state and the decision of a step."""
    return all(
        (host.id, step) in host.kept and ("decisions", step) in host.blobs
        for host in run.hosts
        if not host.dead
    )


def test_a_lost_host_sends_all_back_to_the_last_step_in_memory() -> None:
    with Run(KEEPS, n_hosts=3) as run:
        biases = [run.end_step(step).bias for step in range(3)]
        waiting = run.report(0, 3)
        run.lose("host-1")
        with pytest.raises(Interrupted, match="host-1: its process ended"):
            waiting.result(20)
        resume = run.rejoin(0)
        assert (resume.attempt, resume.step, resume.directory) == (1, 2, None)
        told = {event.kind: event.text for event in run.coordinator.events()}
        assert told["interrupted"] == "at step 3: expert host host-1: its process ended"
        assert told["resumed"].startswith("at step 2, 1 step back, after ")
        assert {host.id for host in resume.trunk} == {"host-0", "host-2"}
        assert torch.equal(run.steps.bias(), biases[1])
        assert set(held(run)) == {"host-0", "host-2"}
        assert [step.step for step in run.steps.metrics()] == [0, 1]
        assert run.end_step(2).step == 2
        assert not any(host.read for host in run.hosts if host.id != "host-1" and host.read > L * E)


def test_a_loss_before_the_first_interval_needs_no_checkpoint() -> None:
    with Run(replace(PLAN, snapshot_interval=100), n_hosts=3) as run:
        wait_until(lambda: copied(run, 0))
        run.steps._recovery._beginning = None
        run.end_step(0)
        read = [host.read for host in run.hosts]
        run.lose("host-0")
        resume = run.rejoin(0)
        assert (resume.step, resume.directory) == (0, None)
        assert [host.read for host in run.hosts] == read
        run.end_step(0)
        wait_until(lambda: copied(run, 0))  # under the new placement: the next loss needs none either
        run.lose("host-1")
        assert run.rejoin(1).step == 0
        assert [host.read for host in run.hosts] == read


def test_memory_that_is_gone_sends_all_back_to_a_checkpoint() -> None:
    with Run(replace(PLAN, snapshot_interval=0), n_hosts=2) as run:
        run.end_step(0)
        run.lose("host-1")
        resume = run.rejoin(0)
        assert (resume.step, resume.directory, resume.trunk) == (0, "", ())
        assert set(held(run)) == {"host-0"}


def test_a_host_that_dies_while_the_run_is_brought_back() -> None:
    with Run(KEEPS, n_hosts=4) as run:
        run.end_step(0)
        run.end_step(1)

        def die() -> None:
            run.world["host-2"].on_assemble = None
            run.lose("host-2")

        run.world["host-2"].on_assemble = die
        run.lose("host-1")
        resume = run.rejoin(0)
        assert resume.step in (0, 2)
        assert set(held(run)) == {"host-0", "host-3"}
        assert run.end_step(resume.step).step == resume.step


def test_a_host_that_dies_after_it_has_assembled_and_before_all_have() -> None:
    with Run(KEEPS, n_hosts=3) as run:
        run.end_step(0)

        def other_dies() -> None:
            run.world["host-0"].on_assemble = None
            wait_until(lambda: len(run.world["host-2"].held) > 1)
            run.lose("host-2")

        run.world["host-0"].on_assemble = other_dies
        run.lose("host-1")
        run.rejoin(0)
        assert set(held(run)) == {"host-0"}


def test_one_interruption_after_the_other() -> None:
    with Run(KEEPS, n_hosts=4) as run:
        for attempt, id in enumerate(("host-0", "host-1", "host-2")):
            run.end_step(run.steps.step)
            run.lose(id)
            resume = run.rejoin(attempt)
            assert resume.attempt == attempt + 1
        assert set(held(run)) == {"host-3"}
        assert run.steps.failure is None


def test_interruptions_without_a_step_in_between_are_no_accident() -> None:
    def join_seven_times(run: Run) -> None:
        for attempt in range(7):
            run.join(0, attempt)

    with Run(KEEPS, n_hosts=2) as run, pytest.raises(RaymoeError, match="interrupted 6 times without a step"):
        join_seven_times(run)


def test_a_commit_that_is_late_does_not_reach_the_next_attempt() -> None:
    with Run(KEEPS, n_hosts=3) as run:
        run.end_step(0)
        run.end_step(1)
        run.world["host-2"].gate.clear()
        run.end_step(2)
        run.lose("host-1")
        joining = run.pool.submit(run.join, 0, 0)
        run.pool.submit(run.join, 1, 0)
        order = run.world["host-2"].held
        assert not joining.done()
        assert list(order) == list(run.world["host-2"].held), "experts moved under a commit"
        run.world["host-2"].gate.set()
        assert joining.result(20).step == 2
        assert run.world["host-2"].calls[-1][:2] == ("commit", 2)
        assert run.steps.failure is None
        assert run.end_step(2).step == 2


def test_a_commit_that_fails_by_a_loss_interrupts() -> None:
    with Run(KEEPS, n_hosts=2) as run:
        run.world["host-1"].error = ChannelError("expert host host-1 cannot be reached")
        run.world["host-1"].gate.clear()
        run.end_step(0)
        run.world["host-1"].gate.set()
        run.world["host-1"].dead = True
        assert run.rejoin(0).step == 0
        assert set(held(run)) == {"host-0"}


def test_a_host_that_hangs_in_prepare_ends_with_its_life() -> None:
    with Run(KEEPS, n_hosts=2) as run:
        wait_until(lambda: copied(run, 0))
        run.world["host-1"].hung = True
        waiting = [run.report(rank) for rank in range(2)]
        wait_until(lambda: run.world["host-0"].calls)
        assert not any(one.done() for one in waiting)
        run.coordinator.roster.lose("host-1", "silent for 1 s")
        for one in waiting:
            with pytest.raises(Interrupted):
                one.result(20)
        assert run.rejoin(0).attempt == 1
        assert set(held(run)) == {"host-0"}


def test_workers_that_are_started_anew_interrupt_once() -> None:
    with Run(KEEPS, n_hosts=2) as run:
        run.end_step(0)
        run.end_step(1)
        resumes = [one.result(20) for one in [run.pool.submit(run.join, rank) for rank in range(2)]]
        assert {resume.attempt for resume in resumes} == {1}
        assert {resume.step for resume in resumes} == {2}
        assert run.end_step(2).step == 2


def test_a_worker_more_brings_all_to_a_common_step() -> None:
    """The new worker has made none of the steps, although no worker of its rank was lost."""
    with Run(KEEPS) as run:
        run.end_step(0)
        run.end_step(1)
        resume = run.steps.join(2, 3, -1, "", timeout=20)
        assert (resume.attempt, resume.step) == (1, 2)
        assert resume.trunk, "it would have gone on from the beginning's weights"
        assert run.steps.workers == 3


def test_a_run_without_a_host_waits_for_the_first_new_one() -> None:
    with Run(KEEPS, n_hosts=2) as run:
        run.end_step(0)
        run.lose("host-0")
        run.lose("host-1")
        joining = [run.pool.submit(run.join, rank, 0) for rank in range(2)]
        assert not any(one.done() for one in joining)
        run.add("host-2")
        assert joining[0].result(20).step == 0
        assert set(held(run)) == {"host-2"}
        joining[1].result(20)
        run.add("host-3")
        decision = run.end_step(0)  # at the boundary it gets its share
        assert set(held(run)) == {"host-2", "host-3"}
        assert decision.epoch == run.steps.table().epoch
        assert decision.snapshot, "what moved is kept anew"


def test_a_host_that_holds_nothing_interrupts_nobody_when_it_dies() -> None:
    with Run(KEEPS, n_hosts=2) as run:
        run.add("host-2")
        run.lose("host-2")
        run.coordinator.orders(starting=0, failed={"host-3": "no CPUs"}, stopped=[])
        assert run.steps.attempt == 0
        run.end_step(0)


def test_an_interruption_in_the_middle_of_a_decision_is_no_step() -> None:
    with Run(KEEPS, n_hosts=2) as run:
        prepare = run.world["host-0"].prepare

        def lost_meanwhile(step: int, epoch: int | None = None) -> float:
            run.lose("host-1")
            return prepare(step)

        run.world["host-0"].prepare = lost_meanwhile  # type: ignore[method-assign]
        waiting = [run.report(rank) for rank in range(2)]
        for one in waiting:
            with pytest.raises(Interrupted):
                one.result(20)
        run.world["host-0"].prepare = prepare  # type: ignore[method-assign]
        assert run.rejoin(0).step == 0
        assert not any(call[0] == "commit" for host in run.hosts for call in host.calls)
        run.end_step(0)


def test_a_coordinator_that_takes_over_lets_nobody_begin_before_hosts_are_at_one_step() -> None:
    first = Run(KEEPS, n_hosts=3)
    first.end_step(0)
    bias = first.end_step(1).bias
    wait_until(lambda: copied(first, 2))
    state = CoordinatorState.from_json(first.coordinator.state().to_json())
    read = [host.read for host in first.hosts]
    first.coordinator.close()
    epochs = [max(host.held) for host in first.hosts]
    with Run(KEEPS, n_hosts=3, world=first.world, state=state, found=False) as run:
        for host in run.hosts:
            host.closed.clear()
        joining = [run.pool.submit(run.join, rank, 7) for rank in range(2)]
        with pytest.raises(Interrupted):
            run.steps.report(report(0, 2))
        assert not any(one.done() for one in joining)
        run.coordinator.place_experts()
        resume = joining[0].result(20)
        joining[1].result(20)
        assert resume.step == 2
        assert torch.equal(run.steps.bias(), bias)
        assert run.steps.table().epoch > max(epochs)
        assert [host.read for host in run.hosts] == read, "a checkpoint was read"
        assert [host.pulled for host in run.hosts] == [0, 0, 0], "experts moved"
        assert run.end_step(2).step == 2
        told = {event.kind: event.text for event in run.coordinator.events()}
        assert "restarted" in told
        assert told["interrupted"] == "the coordinator was restarted", "it does not know at which step"
        assert told["resumed"].startswith("at step 2, after ")
    first.pool.shutdown()


def test_closing_wakes_a_run_that_waits_for_a_host() -> None:
    run = Run(KEEPS, n_hosts=1)
    run.lose("host-0")
    joining = run.pool.submit(run.join, 0, 0)
    run.close()
    with pytest.raises(RaymoeError, match="closed"):
        joining.result(20)


def test_names_are_not_used_again() -> None:
    with Run(KEEPS, n_hosts=2) as run:
        run.lose("host-1")
        with pytest.raises(RaymoeError, match="names are not used again"):
            run.add("host-1")
        assert isinstance(run.world["host-1"], FakeHost)
