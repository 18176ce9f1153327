"""Contenders of a benchmark, each in its own process, which does steps on demand."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from errors import ConfigError, RaymoeError, ResourceError
from jobs.config.device_and_dtype import compute_device, resolve_dtype, worker_device
from jobs.config.run_config import RunConfig

Step = Callable[[], float]
"""Does one step; the seconds it took."""

Build = Callable[[RunConfig], AbstractContextManager[Step]]
"""Sets a contender up in its process; a function of a module's top level."""

_MATMUL = 1536  # rows and columns of the square matrices that measure the peak
_MATMUL_GPU = 8192
_PATIENCE = 300.0  # seconds for a turn


class Contender:
    """A process that does steps of one kind on demand; it ends with the `with` block.

    Args:
        name: Name of the contender, for errors.
        build: Makes the step.
        config: The configuration that the step is made for.
    """

    def __init__(self, name: str, build: Build, config: RunConfig) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=_contend, args=(build, config.to_dict(), self._theirs))

    def __enter__(self) -> Contender:
        self._process.start()
        self._theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` steps.

        Raises:
            RaymoeError: The process failed, with its error text.
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


def on_device(values: dict[str, Any], device: str) -> None:
    """Have a configuration's workers and hosts compute on a device, all of them on one GPU.

    Raises:
        ConfigError: It is neither cpu nor cuda.
        ResourceError: There is no such device.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device!r} should be cpu or cuda")
    share = 0.5 if device == "cuda" else 0.0
    compute_device(share, "--device cuda")
    values["training"]["gpus_per_worker"] = values["cluster"]["gpus_per_host"] = share


def finished(device: torch.device) -> None:
    """Wait until a device has completed its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """Description of the device and the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, torch {torch.__version__}"


def has_transformers() -> bool:
    """Whether transformers is installed, to compare with."""
    return importlib.util.find_spec("transformers") is not None


def _contend(build: Build, values: dict[str, Any], pipe: Connection) -> None:
    try:
        with build(RunConfig.from_dict(values)) as step:
            while True:
                pipe.send([step() for _ in range(pipe.recv())])
    except EOFError:
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def host_process(
    serve: Callable[[dict[str, Any], int, Connection], None], values: dict[str, Any], index: int
) -> Iterator[Any]:
    """Start a process in which `serve` runs an expert host with these values; yield its `HostInfo`."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(values, index, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield pipe.recv()
    finally:
        pipe.close()  # which ends the process
        process.join(10.0)


def until_closed(server: Any, pipe: Connection) -> None:
    """Serve a host until the other end of the pipe closes."""
    pipe.send(server.info)
    try:
        pipe.recv()
    except EOFError:
        pass
    finally:
        server.close()


@contextmanager
def matmul(config: RunConfig) -> Iterator[Step]:
    """Time products of square matrices; a step takes the seconds of one floating-point operation."""
    torch.set_num_threads(config.training.threads or os.cpu_count() or 1)
    device = worker_device(config)
    size = _MATMUL if device.type == "cpu" else _MATMUL_GPU
    left, right = torch.randn(2, size, size, device=device).to(resolve_dtype(config)).unbind(0)
    out = torch.empty_like(left)

    def step() -> float:
        began = time.perf_counter()
        for _ in range(4):
            torch.mm(left, right, out=out)
        finished(device)
        return (time.perf_counter() - began) / (4 * 2 * size**3)

    step()
    yield step


__all__ = [
    "Build",
    "Contender",
    "Step",
    "finished",
    "has_transformers",
    "host_process",
    "machine",
    "matmul",
    "on_device",
    "until_closed",
]
