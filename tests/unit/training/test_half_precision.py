"""With bfloat16 computation, values, gradients and moments stay float32."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from errors import CheckpointError
from jobs.checkpoints.checkpoint_store import find_checkpoint
from jobs.config.run_config import RunConfig
from jobs.training.run_start import RunStart
from model.causal_lm import CausalLM
from model.checkpoints.shards import ShardReader
from model.experts.grouped_swiglu import ExpertShard, experts_backward, experts_forward
from model.optimizers.adamw import AdamW
from support.training_job import RunOutcome, difference, text_corpus, tiny, train

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
STEPS, STOP = 12, 6


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    torch.manual_seed(1)
    drawn = {"matrix": torch.randn(9, 7), "norm": torch.randn(5)}
    return {name: nn.Parameter(one.bfloat16().to(dtype)) for name, one in drawn.items()}


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_steps_are_those_of_float32(scale: float) -> None:
    half, full = parameters(torch.bfloat16), parameters(torch.float32)
    mine, reference = AdamW(half.items()), AdamW(full.items())
    for step in range(20):
        for optimizer in (mine, reference):
            optimizer.zero_grad()
            torch.manual_seed(step)
            for gradient in optimizer.gradients.values():
                gradient.copy_(torch.randn(gradient.shape))
            optimizer.step(1e-4, scale)  # far below the resolution of a bfloat16 weight
    assert mine.squared_norm() == reference.squared_norm()
    for name, value in mine.values().items():
        assert torch.equal(value, full[name])
        assert half[name].dtype == torch.bfloat16
        assert torch.equal(half[name].detach(), value.bfloat16())
        assert all(map(torch.equal, mine.moments()[name], reference.moments()[name]))


def test_gradients_add_up_in_float32() -> None:
    half = parameters(torch.bfloat16)
    optimizer = AdamW(half.items())
    for _ in range(1000):
        (half["norm"] * 0.25).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(optimizer.gradients["norm"], torch.full((5,), 250.0))
    optimizer.step(0.0)


def test_values_of_a_checkpoint_are_taken_over_unrounded() -> None:
    half = parameters(torch.bfloat16)
    optimizer = AdamW(half.items())
    loaded = {name: torch.randn(one.shape) for name, one in half.items()}
    optimizer.load_values(loaded)
    for name, one in half.items():
        assert torch.equal(optimizer.values()[name], loaded[name])
        assert torch.equal(one.detach(), loaded[name].bfloat16())
    with pytest.raises(CheckpointError, match="norm is missing"):
        optimizer.load_values({"matrix": loaded["matrix"]})


def test_gates_stay_float32() -> None:
    model = CausalLM(tiny().model, dtype=torch.bfloat16)
    gates = {name: one for name, one in model.trunk.state_dict().items() if ".gate." in name}
    assert gates and all(one.dtype == torch.float32 for one in gates.values())
    assert model.trunk.lm_head.weight.dtype == torch.bfloat16
    assert all(one.dtype == torch.float64 for name, one in model.double().named_parameters())
    assert all(one.dtype == torch.float32 for name, one in model.named_buffers())


def test_experts_gradients_add_up_in_float32() -> None:
    torch.manual_seed(0)
    w13, w2 = torch.randn(2, 8, 6).bfloat16(), torch.randn(2, 6, 4).bfloat16()
    wide = ExpertShard(w13, w2, torch.zeros(2, 8, 6), torch.zeros(2, 6, 4))
    exact = ExpertShard(w13.double(), w2.double())
    rows, row_ptr = torch.randn(5, 6).bfloat16(), torch.arange(6, dtype=torch.int32)
    expert, gate = torch.tensor([0, 1, 0, 1, 1], dtype=torch.int32), torch.rand(5)
    for _ in range(64):
        for shard, dtype in ((wide, torch.bfloat16), (exact, torch.float64)):
            _, saved = experts_forward(shard, rows.to(dtype), row_ptr, expert, gate, keep=True)
            assert saved is not None
            experts_backward(shard, saved, torch.ones(5, 6, dtype=dtype))
    for mine, theirs in ((wide.d_w13, exact.d_w13), (wide.d_w2, exact.d_w2)):
        assert mine is not None and theirs is not None
        assert float((mine - theirs).norm() / theirs.norm()) < 0.01


def config(dtype: str, workers: int = 1) -> RunConfig:
    return tiny(
        training={
            "dtype": dtype,
            "steps": STEPS,
            "workers": workers,
            "eval_interval": 0,
            "tensorboard": False,
            "batch_size": 4,
            "microbatch_size": 2,
            # Lanes add to one buffer in any order.
            "microbatches_in_flight": 1,
        },
        checkpoint={"interval": STOP},
        cluster={"expert_hosts": 2},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    torch.set_num_threads(1)
    run = config("bfloat16")
    return train(run, text_corpus(run, TEXT), tmp_path_factory.mktemp("whole"), channel="shm")


def test_a_run_learns_what_float32_learns(whole: RunOutcome, tmp_path: Path) -> None:
    run = config("float32")
    full = train(run, text_corpus(run, TEXT), tmp_path, channel="shm")
    assert full.losses[-1] < full.losses[0] - 0.1
    apart = [abs(one - other) for one, other in zip(whole.losses, full.losses, strict=True)]
    assert max(apart) < 0.01 * full.losses[0]
    assert {one.dtype for pair in whole.experts.values() for one in pair} == {torch.float32}


def test_a_stopped_run_goes_on_bit_for_bit(whole: RunOutcome, tmp_path: Path) -> None:
    run = config("bfloat16")
    corpus = text_corpus(run, TEXT)
    train(run, corpus, tmp_path, channel="shm", stop_after=STOP)
    checkpoint = find_checkpoint(tmp_path)
    reader = ShardReader(checkpoint / "model-trunk.safetensors")
    assert reader.tensor("lm_head.weight").dtype == torch.float32
    start = RunStart(run="resumed", step=STOP, weights=checkpoint, moments=True)
    outcome = train(run, corpus, tmp_path, start=start, channel="shm")
    assert difference(outcome, whole) == (0.0, 0.0, 0.0)
