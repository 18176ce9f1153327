"""The contenders of `raymoe bench train`: our worker, and transformers' model with a fused optimizer."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import Step, finished, host_process, until_closed
from jobs.config.device_and_dtype import resolve_dtype, worker_device
from jobs.config.run_config import RunConfig


@contextmanager
def ours(config: RunConfig, *, host_cores: Sequence[int] = ()) -> Iterator[Step]:
    """Our worker, hosts and coordinator, without Ray.

    Args:
        config: The configuration.
        host_cores: Cores that the hosts run on; if empty, all.
    """
    from jobs.data.corpus import PreparedData
    from jobs.data.held_out import HeldOut
    from jobs.fleet.expert_hosts import connector
    from jobs.training.actor_builders import build_coordinator
    from jobs.training.run_settings import compute_threads
    from jobs.training.run_start import RunStart
    from jobs.training.worker_assembly import HostAccess, assemble_worker
    from jobs.training.worker_group import WorkerGroup

    torch.set_num_threads(compute_threads(config))
    rows = _random_rows(config)
    held_out = HeldOut(rows=rows, documents=1, size=1, zlib_bits_per_byte=0.0)
    data = PreparedData(tokenizer="", end_of_text=0, train=rows, train_documents=1, held_out=held_out)
    begin = RunStart(run="bench")
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory(prefix="raymoe-bench-"))
        coordinator = build_coordinator(config, begin, Path(output))
        stack.callback(coordinator.close)
        for index in range(config.cluster.expert_hosts):
            values = {"config": config.to_dict(), "cores": list(host_cores)}
            coordinator.register_host(stack.enter_context(host_process(_serve_host, values, index)))
        steps, device = coordinator.steps, worker_device(config)
        hosts = None
        if config.cluster.expert_hosts:
            coordinator.place_experts()
            hosts = HostAccess(table=coordinator.table(), connect=connector(config.cluster, device))
        made = assemble_worker(
            config,
            data,
            group=WorkerGroup(workers=config.training.workers),
            start=begin,
            output=Path(output),
            coordinator=steps,
            hosts=hosts,
        )
        stack.callback(made.close)
        made.trunk.agreement.attempt = steps.join(0, 1, -1, "").attempt

        def step() -> float:
            began = time.perf_counter()
            made.trunk.apply(steps.report(made.trunk.run(made.worker.inputs(steps.step))))
            finished(device)
            return time.perf_counter() - began

        yield step


def _serve_host(values: dict[str, Any], index: int, pipe: Connection) -> None:
    from actors.host.host_server import ExpertHostServer
    from jobs.training.actor_builders import build_host
    from jobs.training.run_start import RunStart

    if values["cores"]:
        os.sched_setaffinity(0, values["cores"])
    host = build_host(RunConfig.from_dict(values["config"]), RunStart(run="bench"), f"host-{index}")
    until_closed(ExpertHostServer(host), pipe)


@contextmanager
def transformers(config: RunConfig) -> Iterator[Step]:
    """transformers' DeepSeek-V3 in its fastest configuration, with clipping as in its Trainer.

    In bfloat16 its optimizer has no float32 values, which is less work than ours does.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    training = config.training
    torch.set_num_threads(training.threads or os.cpu_count() or 1)
    torch.manual_seed(training.seed)
    shape = DeepseekV3Config(**config.model.to_hf())
    shape._attn_implementation, shape._experts_implementation = "sdpa", "grouped_mm"
    device = worker_device(config)
    model = DeepseekV3ForCausalLM(shape).train().to(device=device, dtype=resolve_dtype(config))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        fused=True,
    )
    generator = torch.Generator().manual_seed(training.seed)

    def step() -> float:
        tokens = torch.randint(
            config.model.vocab_size, (training.batch_size, training.sequence_length), generator=generator
        ).to(device)
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        finished(device)
        return time.perf_counter() - began

    yield step


def _random_rows(config: RunConfig) -> Any:
    """Rows of random tokens, each one document."""
    from jobs.data.packing import InMemory, PackedCorpus, TokenBlock

    training, n_rows = config.training, 16 * config.training.batch_size
    size = n_rows * training.sequence_length + 1
    random = np.random.default_rng(training.seed)
    block = TokenBlock(
        tokens=random.integers(config.model.vocab_size, size=size, dtype=np.int32),
        documents=np.zeros(size, dtype=np.int32),
    )
    return PackedCorpus(
        [InMemory(block)],
        InMemory(block.targets_per_row(training.sequence_length, 0)),
        n_rows=n_rows,
        rows_per_block=n_rows,
        sequence_length=training.sequence_length,
        depth=0,
    )


__all__ = ["ours", "transformers"]
