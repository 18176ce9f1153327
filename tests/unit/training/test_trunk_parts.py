"""Parts of a trunk: which parts make a whole, and which rows they have; lanes that survive a loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.coordinator.common_snapshot import DECISIONS, newest_common
from actors.messages.transfer_orders import EXPERTS, StoredCopy
from actors.messages.trunk_parts import TRUNK, complete, part_name, part_of
from actors.router.deferred_loss import DeferredLoss, DeferringCall, ZeroExperts
from actors.router.training_call import dispatched
from actors.trunk.lanes import LaneThreads
from errors import ChannelError, RemoteError
from model.optimizers.sharded_adamw import rows_of


def test_names() -> None:
    assert part_of(part_name(1, 3)) == (1, 3)
    assert part_of(TRUNK) is None
    assert part_of("trunk-1-of-3-or-so") is None


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], ()),
        ([TRUNK], (TRUNK,)),
        ([part_name(0, 2)], ()),
        ([part_name(0, 2), part_name(1, 3), part_name(2, 3)], ()),
        ([part_name(1, 2), part_name(0, 2), part_name(0, 3)], (part_name(0, 2), part_name(1, 2))),
        (["trunk-0-of-0", "experts"], ()),
    ],
)
def test_what_makes_a_whole_trunk(names: list[str], found: tuple[str, ...]) -> None:
    assert complete(names) == found


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_dealt_out_as_torch_does(size: int, parts: int) -> None:
    rows = [rows_of(rank, parts, size) for rank in range(parts)]
    assert [row for some in rows for row in some] == list(range(size))
    if size:
        lengths = [len(one) for one in torch.arange(size).chunk(parts)]
        assert [len(some) for some in rows] == lengths + [0] * (parts - len(lengths))


def test_a_step_is_common_when_all_parts_of_the_trunk_are_somewhere() -> None:
    def blob(name: str, step: int) -> StoredCopy:
        return StoredCopy(kind=name, owner=name, step=step)

    experts = [StoredCopy(kind=EXPERTS, owner="a", step=step, experts={1: (0, 1)}) for step in (2, 4)]
    a = [*experts, blob(DECISIONS, 2), blob(DECISIONS, 4), *(blob(part_name(0, 2), step) for step in (2, 4))]
    found = newest_common({"a": a, "b": [blob(part_name(1, 2), 2)]}, layers=[1], n_experts=2)
    assert found is not None
    assert (found.step, found.trunk, found.decisions) == (2, ("a", "b"), ("a",))
    assert newest_common({"a": a, "b": []}, layers=[1], n_experts=2) is None


class Failing:
    """A call whose gradients are lost."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def send(self, rows: torch.Tensor, gates: torch.Tensor) -> None:
        self._rows = rows.detach()

    def combine(self) -> torch.Tensor:
        return self._rows * 2

    def send_gradients(self, d_out: torch.Tensor) -> None:
        raise self._error

    def receive_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("nothing was sent")


def test_a_lost_pass_comes_to_its_end_and_says_so_once() -> None:
    deferred = DeferredLoss()
    rows = torch.randn(3, 4, requires_grad=True)
    gates = torch.randn(3, 2, requires_grad=True)
    call = DeferringCall(Failing(ChannelError("gone")), deferred)
    out = dispatched(call, rows, gates, gates.detach()).combine()
    assert torch.equal(out, rows * 2)
    (out.sum() + rows.sum()).backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None and gates.grad is not None
    assert torch.equal(rows.grad, torch.ones(3, 4))
    assert torch.equal(gates.grad, torch.zeros(3, 2))
    later = DeferringCall(Failing(ChannelError("again")), deferred)
    assert torch.equal(dispatched(later, rows, gates, gates.detach()).combine(), torch.zeros(3, 4))
    with pytest.raises(ChannelError, match="gone"):
        deferred.raise_deferred()
    deferred.raise_deferred()


class LaneThatDefers:
    """A lane with a deferred loss, or with none."""

    def __init__(self, loss: Exception | None) -> None:
        self._loss = loss

    def raise_deferred(self) -> None:
        loss, self._loss = self._loss, None
        if loss is not None:
            raise loss


def test_the_first_lanes_loss_is_raised_and_that_of_the_others_forgotten() -> None:
    lanes = LaneThreads([LaneThatDefers(loss) for loss in (None, ChannelError("one"), ChannelError("two"))])  # type: ignore[list-item]
    try:
        with pytest.raises(ChannelError, match="one"):
            lanes.raise_deferred()
        lanes.raise_deferred()
    finally:
        lanes.close()


def test_an_error_that_ends_the_run_is_raised_at_once() -> None:
    rows, gates = torch.randn(3, 4, requires_grad=True), torch.randn(3, 2)
    call = DeferringCall(Failing(RemoteError("a bug")), DeferredLoss())
    out = dispatched(call, rows, gates, gates).combine()
    with pytest.raises(RemoteError, match="a bug"):
        out.sum().backward()  # type: ignore[no-untyped-call]


def test_zero_experts_leave_gates_a_gradient() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    gates = torch.randn(3, 2, requires_grad=True)
    out = ZeroExperts().dispatch(1, rows, torch.zeros(3, 2, dtype=torch.int64), gates).combine()
    assert torch.equal(out, torch.zeros(3, 4))
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert gates.grad is not None and torch.equal(gates.grad, torch.zeros(3, 2))
