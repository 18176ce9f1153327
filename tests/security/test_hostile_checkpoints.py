"""Commands over the checkpoints of strangers: each ends with one line, in bounded time and memory.

Every hostile file is put into a copy of a small model, and a command is run over it; the commands take turns.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest

from support.foreign_model import change_json, save_foreign_model
from support.hostile_files import INDEXES, JSON, NO_FILES, NO_TEXTS, NOT_FINITE, NUMBERS, SHARDS, SIZES
from support.hostile_tokenizers import TOKENIZERS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

CPU_SECONDS = 60.0
"""CPU time of a command with its children: its imports, and two answers of a tokenizer at the limit."""

MEMORY = 1500
"""MiB of the largest process of a command, most of it torch."""

_LONGEST = 600.0  # seconds by the clock, on a machine that is busy with other things
_INDEX = "model.safetensors.index.json"
_COMMANDS = {
    "serve": ["serve", "MODEL", "--port", "PORT"],
    "train": ["train", "--preset", "tiny", "--init", "MODEL", "--output", "OUT"],
    "import": ["import", "MODEL", "OUT"],
    "export": ["export", "MODEL", "OUT"],
    "generate": ["generate", "MODEL", "--prompt", "the cat", "--max-tokens", "2"],
    "eval": ["eval", "MODEL", "--data", "DATA"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended, with the time and memory that it took."""

    code: int
    errors: list[str]
    seconds: float
    cpu_seconds: float
    mebibytes: float


Damage = Callable[[Path], object]


def cases() -> Iterator[tuple[str, str, Damage]]:
    """Name, file and damage of each case."""
    objects = {**NO_FILES, **SIZES, **NO_TEXTS, **JSON, **NOT_FINITE}
    made = {
        "config.json": objects,
        "generation_config.json": objects,
        "tokenizer_config.json": objects,
        _INDEX: {**objects, **INDEXES},
        "model.safetensors": {**NO_FILES, **SHARDS},
        "tokenizer.json": {**NO_FILES, **SIZES},
    }
    for file, table in made.items():
        yield from ((name, file, _in_place(make)) for name, (make, _) in table.items())
    for name, data in TOKENIZERS.items():
        yield name, "tokenizer.json", partial(Path.write_bytes, data=data)
    for field, values in NUMBERS.items():
        yield f"{field} {values[0]}", "config.json", partial(change_json, values={field: values[0]})


def _in_place(make: Damage) -> Damage:
    """A damage in place of the file that is there."""

    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return replace


def run(command: str, directory: Path, scratch: Path) -> Ended:
    """Run a command over a model, and end it if it does not end by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "MODEL": str(directory),
        "OUT": str(scratch / "out"),
        "DATA": str(scratch / "data.txt"),
        "PORT": str(port),
    }
    words = [places.get(word, word) for word in _COMMANDS[command]]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *words],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
        )
        watch = threading.Timer(_LONGEST, process.kill)
        watch.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
        finally:
            watch.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().splitlines()
    return Ended(
        code=process.returncode,
        errors=[line for line in lines if line.startswith(("error: ", "Traceback", "thread "))],
        seconds=time.monotonic() - began,
        cpu_seconds=used.ru_utime + used.ru_stime,
        mebibytes=used.ru_maxrss / 1024,
    )


def test_no_checkpoint_of_a_stranger_costs_more_than_a_line(tmp_path: Path) -> None:
    model = save_foreign_model(tmp_path / "model")
    (tmp_path / "data.txt").write_text("def the cat sat\n" * 100)
    commands = cycle(_COMMANDS)
    wrong: list[str] = []
    worst: dict[str, Ended] = {}
    number = 0
    for number, (name, file, damage) in enumerate(cases(), start=1):
        command = next(commands)
        directory = Path(shutil.copytree(model, tmp_path / "hostile" / str(number)))
        damage(directory / file)
        ended = run(command, directory, tmp_path)
        said = ended.errors[0] if ended.errors else "nothing"
        print(
            f"{command:8} {file:30} {name:34} {ended.cpu_seconds:5.1f} s CPU {ended.mebibytes:6.0f} MiB",
            f" {said[:150]}",
            flush=True,
        )
        for kind in (command, "all"):
            if kind not in worst or worst[kind].cpu_seconds < ended.cpu_seconds:
                worst[kind] = ended
        if (
            ended.code != 2
            or len(ended.errors) != 1
            or ended.cpu_seconds > CPU_SECONDS
            or ended.mebibytes > MEMORY
        ):
            wrong.append(f"{command} with {file} ({name}): {ended}")
        assert not list((tmp_path / "out").glob("**/*.safetensors"))
        shutil.rmtree(directory)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for kind, ended in worst.items():
        print(f"longest of {kind}: {ended.cpu_seconds:.1f} s CPU, {ended.mebibytes:.0f} MiB")
    print(f"{number} checkpoints, {len(wrong)} of them wrong")
    assert wrong == []
