"""Contenders of a benchmark, each in a process that steps when it is told to."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from errors import RaymoeError, ResourceError
from jobs.config import RunConfig

Step = Callable[[], float]
"""Does one step; the seconds it took."""

Build = Callable[[RunConfig], AbstractContextManager[Step]]
"""Sets a contender up in its process; a function of a module's top level."""

_MATMUL = 1536  # rows and columns of the square matrices that measure the peak
_PATIENCE = 300.0  # seconds for a turn


class Contender:
    """A process that does steps of one kind on demand; ends with the `with` block.

    Args:
        name: for messages.
        build: makes the step.
        config: what it is made for.
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


def has_transformers() -> bool:
    """Whether the peer of our benchmarks is installed."""
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
    """An expert host in a process of its own, which `serve` runs with these values; its `HostInfo`."""
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


__all__ = ["Build", "Contender", "Step", "has_transformers", "host_process", "matmul", "until_closed"]
