"""A server to measure: `raymoe serve` in a process of its own, and a model with random weights for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from errors import ResourceError

_STOP_SECONDS = 90.0  # for requests under way to end, and for Ray


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredServer:
    """A server.

    Attributes:
        url: its root.
        process: the command's, whose descendants are all of the server; None for one that is not ours.
    """

    url: str
    process: psutil.Process | None = None


def write_random_model(directory: Path) -> None:
    """bench-20m with random weights, and a tokenizer trained on this package's own source."""
    import jobs
    from jobs.config.presets import preset
    from jobs.data.tokenizer import save_tokenizer, train_tokenizer
    from model.causal_lm import CausalLM
    from model.checkpoints.pretrained import save_pretrained
    from model.checkpoints.sources import RandomSource

    config = preset("bench-20m").model
    model = CausalLM(config)
    model.load(RandomSource(config, seed=0))
    save_pretrained(model, directory)
    files = sorted(Path(jobs.__file__).parent.rglob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    save_tokenizer(*train_tokenizer(texts, config.vocab_size), directory)


@contextmanager
def served(checkpoint: Path | None, options: Sequence[str] = ()) -> Iterator[MeasuredServer]:
    """A server for as long as the block lasts; it leaves no process behind.

    Args:
        checkpoint: what to serve; None makes a model with random weights.
        options: further ones of `raymoe serve`.

    Raises:
        ResourceError: it does not come up, with the line that it ended with.
    """
    with tempfile.TemporaryDirectory(prefix="raymoe-bench-") as scratch:
        if checkpoint is None:
            checkpoint = Path(scratch) / "bench-20m"
            write_random_model(checkpoint)
        with (Path(scratch) / "serve.log").open("w+", encoding="utf-8") as log:
            process = _start(checkpoint, options, log)
            try:
                yield MeasuredServer(url=_url(process, log), process=psutil.Process(process.pid))
            finally:
                _stop(process)


def _start(checkpoint: Path, options: Sequence[str], log: IO[str]) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs.cli", "serve", str(checkpoint.resolve())),
            *("--json", "--port", str(port), *options),
        ],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # Ctrl-C is ours, and the server is told when we are done
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))},
    )


def _url(process: subprocess.Popen[str], log: IO[str]) -> str:
    assert process.stdout is not None
    with process.stdout as told:
        line = told.readline()
    if line:
        url: str = json.loads(line)["url"]
        return url
    process.wait()
    log.seek(0)
    said = [text for text in log.read().splitlines() if text.strip()] or ["it said nothing"]
    raise ResourceError(f"raymoe serve does not come up: {said[-1].removeprefix('error: ')}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Let the server end, and end what is left of it after that."""
    family: list[psutil.Process] = []
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(_STOP_SECONDS)
    except psutil.NoSuchProcess:
        pass
    except subprocess.TimeoutExpired:
        process.kill()
    finally:
        _, alive = psutil.wait_procs(family, timeout=10)
        for one in alive:
            one.kill()
        process.wait()


__all__ = ["MeasuredServer", "served", "write_random_model"]
