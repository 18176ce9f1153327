"""`raymoe bench`: training steps through the real entry point, and round trips over channels."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from channels import Channel, Phase, Request, RequestId, Server, connect
from errors import ConfigError
from jobs.config import RunConfig
from jobs.presets import summary

_WARM_UP = 3  # steps that fill caches and pools
_KINDS = ("local", "shm", "grpc")
_HIDDEN = 256  # of the rows that travel, as in bench-20m
_ROWS = {"1 KiB": 1, "1 MiB": 1024, "8 MiB": 8192}  # of float32


def bench_train(
    config: RunConfig, *, steps: int, address: str | None = None, debug: bool = False
) -> dict[str, Any]:
    """Train a few steps and time them, evaluation and checkpoints left out.

    Returns:
        tokens_per_second (median over the steps, with the lowest and highest), and what was run.
    """
    from jobs.metrics import METRICS_FILE, read_metrics
    from jobs.train import train

    values = config.to_dict()
    values["training"] |= {"steps": _WARM_UP + steps, "eval_interval": 0, "tensorboard": False}
    values["checkpoint"]["interval"] = 0
    values["data"]["validation_fraction"] = 1e-9  # one document: what comes after the last step is no part
    timed = RunConfig.from_dict(values)
    with tempfile.TemporaryDirectory(prefix="raymoe-bench-") as directory:
        train(timed, output=Path(directory) / "run", address=address, debug=debug)
        speeds = [line["tokens_per_second"] for line in read_metrics(Path(directory) / "run" / METRICS_FILE)]
    speeds = speeds[_WARM_UP:]
    counts = summary(timed)
    return {
        "tokens_per_second": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "steps": steps,
        "tokens_per_step": timed.training.batch_size * timed.training.sequence_length,
        "total_parameters": counts["total_parameters"],
        "active_parameters": counts["active_parameters"],
        "workers": timed.training.workers,
        "expert_hosts": timed.cluster.expert_hosts,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }


def bench_channel(kinds: Sequence[str], *, seconds: float = 1.0) -> dict[str, Any]:
    """Time round trips of rows that come back as they went.

    Returns:
        For each kind and size: the median of a round trip in µs, and GB/s of both ways together.

    Raises:
        ConfigError: a kind is unknown.
    """
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown:
        raise ConfigError(f"--kind {unknown[0]!r} is unknown; use one of {', '.join(_KINDS)}")
    results: dict[str, Any] = {}
    for kind in kinds:
        with _echo(kind) as channel:
            for size, rows in _ROWS.items():
                microseconds = _round_trip(channel, rows, seconds / len(_ROWS))
                moved = 2 * rows * _HIDDEN * 4
                name = f"{kind}_{size.replace(' ', '')}"
                results[f"{name}_us"] = microseconds
                results[f"{name}_GB_per_s"] = moved / microseconds / 1e3
    return results


def _round_trip(channel: Channel, rows: int, seconds: float) -> float:
    """Median of a round trip of `rows` rows, in µs."""
    row = torch.rand(rows, _HIDDEN)
    tensors = (
        row,
        torch.arange(rows + 1, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int32),
        torch.ones(rows),
    )
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 8 or time.perf_counter() < end:
        request = Request(
            id=RequestId(
                run="bench",
                epoch=0,
                step=len(times),
                microbatch=0,
                layer=0,
                phase=Phase.INFER,
                router="bench",
            ),
            tensors=tensors,
        )
        began = time.perf_counter()
        channel.submit(request).result(60.0)
        times.append(time.perf_counter() - began)
    return statistics.median(times[len(times) // 4 :]) * 1e6


@contextmanager
def _echo(kind: str) -> Iterator[Channel]:
    """A channel to a process that sends rows back; `local` stays in this one."""
    if kind == "local":
        with _connected(_serve(kind)) as channel:
            yield channel
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_echo_process, args=(kind, there), daemon=True)
    process.start()
    there.close()
    try:
        channel = connect(here.recv())
        try:
            yield channel
        finally:
            channel.close()
    finally:
        here.close()  # which ends the process
        process.join(10.0)


@contextmanager
def _connected(server: Server) -> Iterator[Channel]:
    channel = connect(server.address)
    try:
        yield channel
    finally:
        channel.close()
        server.close()


def _echo_process(kind: str, pipe: Connection) -> None:
    server = _serve(kind)
    pipe.send(server.address)
    try:
        pipe.recv()
    except EOFError:
        pass
    finally:
        server.close()


def _serve(kind: str) -> Server:
    def echo(request: Request) -> tuple[torch.Tensor, ...]:
        return (request.tensors[0],)

    if kind == "shm":
        import channels.shm as shm

        return shm.serve(echo)
    if kind == "grpc":
        import channels.grpc as grpc

        return grpc.serve(echo)
    import channels.local as local

    return local.serve(echo)


__all__ = ["bench_channel", "bench_train"]
