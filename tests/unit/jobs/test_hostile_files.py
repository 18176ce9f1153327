"""Files beside a model's weights, as nobody means well by: every reader, every command, one line."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errors import CheckpointError, DataError, ResourceError, UsageError
from jobs.chat.chat_template import ChatTemplate
from jobs.checkpoints.checkpoint_store import read_state, run_config
from jobs.checkpoints.generation_defaults import GenerationDefaults
from jobs.cli.app import app
from jobs.data.carried_files import CarriedFiles
from jobs.data.special_tokens import special_tokens
from jobs.data.tokenizer import load_tokenizer
from jobs.tools.convert import import_checkpoint
from jobs.training.resumed_config import resumed_config
from support.foreign_model import change_json, save_foreign_model
from support.hostile_files import JSON, NO_FILES, NO_TEXTS, NOT_FINITE, SIZES, Make

pytestmark = pytest.mark.timeout(300)

_FILES = {**NO_FILES, **SIZES}
_OBJECTS = {**_FILES, **NO_TEXTS, **JSON, **NOT_FINITE}
_STATE = {name: case for name, case in _OBJECTS.items() if name not in NOT_FINITE}  # it may have NaN


def _carried(directory: Path) -> object:
    return CarriedFiles.of_model(directory)


READERS: dict[str, tuple[Callable[[Path], object], str, dict[str, tuple[Make, str]]]] = {
    "generation settings": (GenerationDefaults.of, "generation_config.json", _OBJECTS),
    "carried configuration": (_carried, "config.json", _OBJECTS),
    "special tokens": (special_tokens, "tokenizer_config.json", _OBJECTS),
    "special tokens apart": (special_tokens, "special_tokens_map.json", _OBJECTS),
    "template's settings": (ChatTemplate.from_directory, "tokenizer_config.json", _OBJECTS),
    "template": (ChatTemplate.from_directory, "chat_template.jinja", {**_FILES, **NO_TEXTS}),
    "named template": (
        ChatTemplate.from_directory,
        "additional_chat_templates/default.jinja",
        {**_FILES, **NO_TEXTS},
    ),
    "state of a run": (read_state, "state.json", _STATE),
    "tokenizer": (lambda path: load_tokenizer(path, 300), "tokenizer.json", _FILES),
    **{
        f"carried {name}": (_carried, name, _FILES)
        for name in (
            "tokenizer.json", "added_tokens.json", "tokenizer.model", "tiktoken.model", "vocab.json",
            "merges.txt", "chat_template.json", "additional_chat_templates/a.jinja", "tokenization_x.py",
            "generation_config.json",
        )
    },
}  # fmt: skip
"""Readers of the files beside weights: the function, its file, and what that can be."""

CASES = [
    pytest.param(read, file, make, said, id=f"{reader}: {name}")
    for reader, (read, file, table) in READERS.items()
    for name, (make, said) in table.items()
]


@pytest.mark.parametrize(("read", "file", "make", "said"), CASES)
def test_a_hostile_file_is_refused_in_one_line(
    tmp_path: Path, read: Callable[[Path], object], file: str, make: Make, said: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(UsageError) as caught:
        read(tmp_path)
    line = str(caught.value)
    assert str(path) in line
    assert said in line
    assert line.isprintable()
    assert len(line) < len(str(path)) + 500


def test_reading_all_of_them_takes_little_time_and_memory(tmp_path: Path) -> None:
    """In a process of its own, whose largest size shows what the worst of them costs."""
    script = """
import json, resource, sys, tempfile
from pathlib import Path
from errors import UsageError
from model.checkpoints.hf_config import read_hf_config
from support.hostile_files import JSON, NO_FILES, NO_TEXTS, NOT_FINITE, SIZES
before = resource.getrusage(resource.RUSAGE_SELF)
for at, (make, said) in enumerate({**JSON, **NO_FILES, **NO_TEXTS, **NOT_FINITE, **SIZES}.values()):
    folder = Path(sys.argv[1]) / str(at)
    folder.mkdir()
    make(folder / "config.json")
    try:
        read_hf_config(folder)
    except UsageError:
        continue
    raise AssertionError(said)
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                  (after.ru_maxrss - before.ru_maxrss) / 1024]))
"""
    root = Path(__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(root), str(root / 'tests')]!r}\n{script}",
         str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=250,
    )  # fmt: skip
    seconds, mebibytes = json.loads(found.stdout)
    assert seconds < 5
    assert mebibytes < 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign_model(tmp_path_factory.mktemp("foreign") / "model")


def _copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def _deep(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def _pipe(path: Path) -> None:
    NO_FILES["named pipe"][0](path)


COMMANDS: dict[str, list[str]] = {
    "serve": ["serve", "MODEL", "--port", "PORT"],
    "train": ["train", "--preset", "tiny", "--init", "MODEL", "--output", "OUT"],
    "import": ["import", "MODEL", "OUT"],
    "export": ["export", "MODEL", "OUT"],
    "generate": ["generate", "MODEL", "--prompt", "the cat"],
    "eval": ["eval", "MODEL", "--data", "DATA"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # by an import of Ray Serve
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", _deep),
        ("config.json", _pipe),
        ("model.safetensors.index.json", _deep),
        ("model.safetensors", _pipe),
        ("tokenizer.json", _pipe),
        ("tokenizer.json", _deep),
        ("tokenizer_config.json", _deep),
        ("vocab.json", _pipe),
    ],
)
def test_a_command_ends_with_one_line_before_anything_starts(
    model: Path, tmp_path: Path, command: str, file: str, damage: Callable[[Path], None]
) -> None:
    if file == "vocab.json" and command in ("serve", "generate", "eval"):
        pytest.skip("a file that only other libraries read, which train, import and export carry")
    directory = _copied(model, tmp_path)
    (directory / file).unlink(missing_ok=True)
    damage(directory / file)
    (tmp_path / "data.txt").write_text("def the cat\n" * 100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"PORT": port, "MODEL": directory, "OUT": tmp_path / "out", "DATA": tmp_path / "data.txt"}
    result = CliRunner().invoke(app, [str(places.get(word, word)) for word in COMMANDS[command]])
    assert result.exit_code == 2, (result.stderr, result.exception)
    (line,) = [one for one in result.stderr.splitlines() if one.startswith("error: ")]
    assert str(directory / file) in line
    assert result.stderr.splitlines()[-1] == line
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_an_absurd_end_token_is_named(model: Path, tmp_path: Path) -> None:
    directory = _copied(model, tmp_path)
    change_json(directory / "config.json", {"eos_token_id": 10**39})
    with pytest.raises(DataError, match=r"config\.json: eos_token_id is 1000.*; write a token's id"):
        load_tokenizer(directory, 512)


def test_a_state_of_no_run_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    fields = {f"x{at}\n\x1b[31m" * 50: at for at in range(2000)}
    values = {"format": 1, "step": 1, "bias_version": 1, "config": fields}
    (checkpoint / "state.json").write_text(json.dumps(values))
    for read in (lambda: run_config(checkpoint, read_state(checkpoint)), lambda: resumed_config(tmp_path)):
        with pytest.raises(CheckpointError, match=r"state\.json: config is that of no run") as caught:
            read()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < len(str(tmp_path)) + 500


@pytest.mark.parametrize("short", ["free_memory", "disk"])
def test_weights_that_have_no_room_are_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    """A sparse file of weights takes no room until it is written again."""
    usage: Any = shutil.disk_usage(tmp_path)._replace(free=1000)
    if short == "disk":
        monkeypatch.setattr("jobs.tools.convert.shutil.disk_usage", lambda _: usage)
    else:
        monkeypatch.setattr("jobs.tools.convert.free_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"bytes (of memory|on the disk), and 1,000 are free"):
        import_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_too_many_templates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for at in range(101):
        (tmp_path / "additional_chat_templates" / f"{at}.jinja").write_text("x")
    with pytest.raises(DataError, match="more than 100 files additional_chat_templates"):
        ChatTemplate.from_directory(tmp_path)
