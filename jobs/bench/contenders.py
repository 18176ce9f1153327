"""The contenders of `raymoe bench train`, each in a process that steps when it is told to."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from errors import RaymoeError, ResourceError
from jobs.config import RunConfig

Step = Callable[[], float]
"""Does one step; the seconds it took."""

_MATMUL = 1536  # rows and columns of the square matrices that measure the peak
_PATIENCE = 300.0  # seconds for a turn


class Contender:
    """A process that does steps of one kind on demand; ends with the `with` block.

    Args:
        name: `local`, `remote`, `transformers`, or `matmul`, whose steps are seconds per flop.
    """

    def __init__(self, name: str, config: RunConfig) -> None:
        self._name = name
        self.available = name != "transformers" or importlib.util.find_spec("transformers") is not None
        context = multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=_contend, args=(name, config.to_dict(), self._theirs))

    def __enter__(self) -> Contender:
        if self.available:
            self._process.start()
            self._theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        if self.available:
            self._process.join(10.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` steps.

        Raises:
            RaymoeError: what the process failed with.
        """
        try:
            self._pipe.send(count)
            if not self._pipe.poll(_PATIENCE):
                raise ResourceError(f"{count} steps of {self._name} took longer than {_PATIENCE:g} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RaymoeError(f"the process of {self._name} died: {error!r}") from error
        if isinstance(answer, str):
            raise RaymoeError(f"{self._name} failed: {answer}")
        seconds: list[float] = answer
        return seconds


def _contend(name: str, values: dict[str, Any], pipe: Connection) -> None:
    config = RunConfig.from_dict(values)
    build = {"local": _ours, "remote": _ours, "transformers": _transformers, "matmul": _matmul}[name]
    try:
        with build(config) as step:
            while True:
                pipe.send([step() for _ in range(pipe.recv())])
    except EOFError:
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def _ours(config: RunConfig) -> Iterator[Step]:
    """The real worker, hosts and coordinator, without Ray around them."""
    from actors.clients import HostClient
    from actors.coordinator import Coordinator
    from channels.choose import connect, pick
    from jobs.assembly import Start, assemble_worker, compute_threads, placement, training_plan
    from jobs.data import PreparedData
    from jobs.held_out import HeldOut

    torch.set_num_threads(compute_threads(config))
    rows = _random_rows(config)
    held_out = HeldOut(rows=rows, documents=1, size=1, zlib_bits_per_byte=0.0)
    data = PreparedData(
        tokenizer="", end_of_text=0, train=rows, train_tokens=1, train_documents=1, held_out=held_out
    )
    begin = Start(run="bench")
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory(prefix="raymoe-bench-"))
        coordinator = Coordinator(
            training_plan(config),
            owner=placement(config),
            n_layers=len(config.model.moe_layers),
            n_experts=config.model.n_routed_experts,
            n_hosts=config.cluster.expert_hosts,
            control=HostClient,
        )
        stack.callback(coordinator.close)
        for index in range(config.cluster.expert_hosts):
            coordinator.register_host(stack.enter_context(_host(config, index)))
        made = assemble_worker(
            config,
            data,
            rank=0,
            start=begin,
            output=Path(output),
            coordinator=coordinator,
            table=coordinator.table() if config.cluster.expert_hosts else None,
            connect=lambda host: connect(pick(config.cluster.channel, host.addresses)),
        )
        stack.callback(made.close)

        def step() -> float:
            began = time.perf_counter()
            made.trunk.apply(coordinator.report(made.trunk.run(made.worker.inputs(coordinator.step))))
            return time.perf_counter() - began

        yield step


@contextmanager
def _host(config: RunConfig, index: int) -> Iterator[Any]:
    """An expert host in a process of its own; its `HostInfo`."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve_host, args=(config.to_dict(), index, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield pipe.recv()
    finally:
        pipe.close()  # which ends the process
        process.join(10.0)


def _serve_host(values: dict[str, Any], index: int, pipe: Connection) -> None:
    from actors.serving import ExpertHostServer
    from jobs.assembly import Start, build_host

    server = ExpertHostServer(build_host(RunConfig.from_dict(values), Start(run="bench"), index))
    pipe.send(server.info)
    try:
        pipe.recv()
    except EOFError:
        pass
    finally:
        server.close()


@contextmanager
def _transformers(config: RunConfig) -> Iterator[Step]:
    """transformers' DeepSeek-V3 at its fastest on a CPU, with clipping as its Trainer has it."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    training = config.training
    torch.set_num_threads(training.threads or os.cpu_count() or 1)
    torch.manual_seed(training.seed)
    shape = DeepseekV3Config(**config.model.to_hf())
    shape._attn_implementation, shape._experts_implementation = "sdpa", "grouped_mm"
    model = DeepseekV3ForCausalLM(shape).train()
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
        )
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    yield step


@contextmanager
def _matmul(config: RunConfig) -> Iterator[Step]:
    """Products of square float32 matrices, as fast as the machine does them: seconds per flop."""
    torch.set_num_threads(config.training.threads or os.cpu_count() or 1)
    left, right = torch.randn(2, _MATMUL, _MATMUL).unbind(0)
    out = torch.empty_like(left)

    def step() -> float:
        began = time.perf_counter()
        for _ in range(4):
            torch.mm(left, right, out=out)
        return (time.perf_counter() - began) / (4 * 2 * _MATMUL**3)

    step()
    yield step


def _random_rows(config: RunConfig) -> Any:
    """Rows of random tokens, each one document."""
    from jobs.packing import Block, InMemory, PackedCorpus

    training, n_rows = config.training, 16 * config.training.batch_size
    size = n_rows * training.sequence_length + 1
    random = np.random.default_rng(training.seed)
    block = Block(
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


__all__ = ["Contender", "Step"]
