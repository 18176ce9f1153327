"""Starts a server to measure, `raymoe serve` in its own process, with a model of random weights if needed."""

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

_STOP_SECONDS = 90.0  # for running requests to end, and for Ray to shut down


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredServer:
    """A running server.

    Attributes:
        url: URL of its root.
        process: Process of the command, whose descendants are the server; None for a server started
            elsewhere.
    """

    url: str
    process: psutil.Process | None = None


def write_random_model(directory: Path) -> None:
    """Write bench-20m with random weights, and a tokenizer trained on the source of `jobs`."""
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
    """Run a server during the block; all of its processes end with it.

    Args:
        checkpoint: The checkpoint to serve; None makes a model with random weights.
        options: Further options of `raymoe serve`.

    Raises:
        ResourceError: The server does not start; the message has its last line of output.
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
        start_new_session=True,  # so that Ctrl-C reaches only this process, which then stops the server
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
    raise ResourceError(f"raymoe serve did not start: {said[-1].removeprefix('error: ')}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop the server, and kill its remaining processes after a timeout."""
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
