"""Cases on a simulated GPU: tensors without values, on a device that is not the CPU.

A case that mixes devices, or makes the CPU wait for a value, fails. torch's fake tensors know shapes, types
and devices; torch's hooks for a backend in Python give them a device that this build of torch lacks. These
hooks must be set before a process's first backward pass, so tests/unit/training/test_accelerator.py starts
a process for the cases.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import backend_registration

import engine.batch
import engine.runner
from engine.batch import Stretch
from engine.runner import Runner
from engine.weights import TrunkWeights
from jobs.config.presets import preset
from model.balance_loss import BalanceWeights
from model.device_copies import to_cpu, to_device
from model.dispatch import HostSlice, OutgoingRows, combine_rows
from model.experts.grouped_products import InOneKernel, group
from model.experts.grouped_swiglu import ExpertShard, experts_backward, experts_forward
from model.experts.local import LocalExperts
from model.experts.protocols import CompletedPending, Experts, Pending
from model.losses.training_losses import LossWeights, training_loss
from model.optimizers.adamw import AdamW
from model.routing_trace import Trace
from model.transformer import Transformer

DEVICE = "toy"
WIDE, NARROW = 16, 8

CONFIG = preset("tiny").model


class Away:
    """A stand-in for lanes."""

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        there(rows, idx, gates)
        assert rows.dtype == torch.bfloat16
        return CompletedPending(rows * gates.sum(1, keepdim=True).to(rows.dtype))

    @property
    def pair(self) -> tuple[Experts, Experts]:
        return Away(), Away()


def there(*tensors: Tensor) -> None:
    assert {tensor.device.type for tensor in tensors} == {DEVICE}


def trunk(device: torch.device) -> Transformer:
    """A trunk in bfloat16, made on its device: fake modules cannot be moved or converted."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Transformer(CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)


def grouped(device: torch.device) -> None:
    for of_rows in (torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64, device=device)):
        like = torch.empty(0, device=device, dtype=torch.bfloat16)
        groups = group(of_rows, 5, like=like, widths=(16, 8))
        assert isinstance(groups, InOneKernel)
        there(groups.ends)


def experts_of_a_host(device: torch.device) -> None:
    shard = ExpertShard(
        torch.empty(4, 2 * NARROW, WIDE, device=device, dtype=torch.bfloat16),
        torch.empty(4, WIDE, NARROW, device=device, dtype=torch.bfloat16),
        torch.zeros(4, 2 * NARROW, WIDE, device=device),
        torch.zeros(4, WIDE, NARROW, device=device),
    )
    row_ptr, expert = torch.zeros(7, dtype=torch.int32), torch.zeros(12, dtype=torch.int32)
    rows, gate = torch.empty(6, WIDE, device=device, dtype=torch.bfloat16), torch.empty(12, device=device)
    partial, saved = experts_forward(shard, rows, row_ptr, expert, gate, keep=True)
    assert saved is not None
    d_rows, d_gate = experts_backward(shard, saved, partial)
    there(partial, d_rows, d_gate)
    assert {partial.dtype, d_rows.dtype, d_gate.dtype} == {torch.bfloat16}


def experts_in_process(device: torch.device) -> None:
    for trains in (False, True):
        with torch.device(device), torch.set_grad_enabled(trains):
            experts = LocalExperts(
                [1], n_experts=4, hidden_size=WIDE, intermediate_size=NARROW, dtype=torch.bfloat16
            )
            rows = torch.empty(6, WIDE, dtype=torch.bfloat16, requires_grad=trains)
            idx, gates = torch.zeros(6, 2, dtype=torch.int64), torch.empty(6, 2, requires_grad=trains)
            out = experts.dispatch(1, rows, idx, gates).combine()
            there(out)
        if trains:
            out.sum().backward()  # type: ignore[no-untyped-call]
            assert rows.grad is not None
            there(rows.grad)


def slice_of(*rows: int) -> HostSlice:
    row = torch.zeros(len(rows), dtype=torch.int64)
    return HostSlice(row=row, row_ptr=row, expert=row, pair=row, gate=row)


def rows_out_and_sums_back(device: torch.device) -> None:
    """Rows to two hosts and their sums, one host reached on the GPU, the other through CPU memory."""
    rows, slices = torch.empty(5, WIDE, device=device), (slice_of(0, 1, 2), slice_of(1), None)
    out = OutgoingRows(rows)
    parts = []
    for at, part in enumerate(slices):
        if part is not None:
            parts.append(out.part(part, there=at == 0))
            assert parts[at].device.type == (DEVICE if at == 0 else "cpu")
    like = rows.new_empty(0, WIDE)
    there(
        combine_rows(slices, [*parts, None], 5, like), combine_rows(slices, [None, parts[1], None], 5, like)
    )
    there(combine_rows(slices, [None, None, None], 5, like), to_device(parts[1], device))
    assert {one.device.type for one in to_cpu(rows, parts[1])} == {"cpu"}


def training_step(device: torch.device) -> None:
    """A training step without recompute, whose second pass runs in a thread without fake tensors."""
    model = trunk(device)
    optimizer = AdamW(model.named_parameters())
    tokens = torch.zeros(2, 33 + CONFIG.num_nextn_predict_layers, dtype=torch.int64, device=device)
    for segments in (None, torch.zeros(tokens.shape, dtype=torch.int32, device=device)):
        balance = BalanceWeights(strategy="bias", sequence=1e-4)
        losses = training_loss(
            model,
            tokens,
            segments,
            experts=Away(),
            trace=Trace(),
            weights=LossWeights(n_targets=64, n_rows=2, balance=balance, mtp=0.3),
        )
        losses.total.backward()  # type: ignore[no-untyped-call]
    optimizer.step(1e-3, 0.5)
    optimizer.zero_grad()
    there(losses.total, *optimizer.gradients.values(), *optimizer.values().values())


def decoding_step(device: torch.device) -> None:
    model = trunk(device)
    weights = TrunkWeights.of(model, modules=True)
    stretches = [
        Stretch(pages=[0], start=3, end=4, tokens=[1]),
        Stretch(pages=[1], start=2, end=5, tokens=[1, 2, 3]),
    ]
    # Numbers that fake tensors know would really be moved.
    for module in (engine.batch, engine.runner):
        module.on_device = lambda device, values: torch.zeros(
            np.shape(values), dtype=torch.int64, device=device
        )
    for overlap_from in (None, 2):
        runner = Runner(weights, Away(), n_pages=4, page_size=16, overlap_from=overlap_from)
        states = runner.compute(runner.batch(stretches), [0, 3])
        there(states.hidden, states.normed, states.logits)
        there(runner.draft(1, runner.draft_batch(stretches), states.normed, range(4)))


CASES: dict[str, Callable[[torch.device], None]] = {
    case.__name__: case
    for case in (
        grouped,
        experts_of_a_host,
        experts_in_process,
        rows_out_and_sums_back,
        training_step,
        decoding_step,
    )
}


def main() -> None:
    """Run all cases and print the error of each."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    said: dict[str, str] = {}
    for name, case in CASES.items():
        try:
            # One thread: fake tensors are not made for the engine's own.
            with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
                case(torch.device(DEVICE))
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
