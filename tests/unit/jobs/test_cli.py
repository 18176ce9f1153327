"""The command line without Ray: options, exit codes, stdout and stderr."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console
from typer.core import TyperGroup
from typer.testing import CliRunner

from errors import CheckpointError, ConfigError, RaymoeError, ResourceError
from jobs.cli import train_command
from jobs.cli.app import app
from jobs.config.config_file import load_config
from jobs.config.presets import preset
from jobs.console import Progress, finish, own_error, surfaced
from jobs.fleet.stop_signals import Stopped
from jobs.serving.config import ServeConfig

ROOT = Path(__file__).parents[3]
runner = CliRunner()


def test_config_prints_what_config_takes(tmp_path: Path) -> None:
    result = runner.invoke(app, ["config", "tiny", "--set", "training.steps=3"])
    assert result.exit_code == 0
    file = tmp_path / "run.yaml"
    file.write_text(result.stdout)
    assert load_config(path=file) == load_config(preset_name="tiny", overrides=["training.steps=3"])
    again = runner.invoke(app, ["config", "--config", str(file)])
    assert again.stdout == result.stdout


def test_config_as_json_is_one_object_with_the_counts() -> None:
    result = runner.invoke(app, ["config", "bench-20m", "--json"])
    values = json.loads(result.stdout)
    assert values["summary"]["total_parameters"] == preset("bench-20m").model.total_parameters()
    assert (
        values["training"] == yaml.safe_load(runner.invoke(app, ["config", "bench-20m"]).stdout)["training"]
    )


def test_every_problem_is_a_line_on_stderr_and_the_exit_code_is_two() -> None:
    result = runner.invoke(
        app, ["train", "--preset", "tiny", "--set", "training.step=1", "--set", "data.pat=x"]
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: training.step: unknown field; did you mean training.steps?",
        "error: data.pat: unknown field; did you mean data.path?",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--steps", "0"], "--steps"),
        (["generate", "x", "--prompt", "x", "--threads", "100000"], "--threads is '100000'; give a whole"),
        (
            ["generate", "x", "--prompt", "x", "--temperature", "nan"],
            "is 'nan'; give a number of at least 0;",
        ),
        (["generate", "x", "--prompt", "x", "--generation-config", "y"], "is 'y'; give auto or none;"),
        (["serve", "x", "--port", "abc"], "--port is 'abc'; give a whole number from 1 to 65,535;"),
        (["scale", "x"], "N is 'x'; give a whole number;"),
        (["impor"], "Did you mean 'import'? `raymoe --help`"),
        (["eval", "x", "--threads", "100000"], "--threads is"),
        (["bench", "trian"], "trian"),
        (["trian"], "trian"),
        (["generate", "x"], "--prompt"),
        (["train", "--preset", "nope"], "preset 'nope' does not exist"),
        (["train", "--resume", "/nowhere"], "/nowhere"),
        (["train", "--resume", "/nowhere", "--preset", "tiny"], "leave out --preset"),
        (["generate", "/nowhere", "--prompt", "x"], "/nowhere"),
        (["eval", "/nowhere"], "/nowhere"),
        (["export", "/nowhere", "/tmp"], "/nowhere"),
        (["import", "/nowhere", "/tmp"], "/nowhere"),
        (["bench", "channel", "--kind", "pigeon"], "pigeon"),
        (["train", "--nonesuch"], "--nonesuch; `raymoe train --help`"),
        (["config", "tiny", "demo"], "demo"),
    ],
)
def test_wrong_usage_ends_with_two_and_names_it(arguments: list[str], said: str) -> None:
    result = runner.invoke(app, arguments, prog_name="raymoe")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "╭" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_a_group_without_a_command_shows_its_help(arguments: list[str]) -> None:
    result = runner.invoke(app, arguments, prog_name="raymoe")
    assert "Commands:" in result.output
    assert "error:" not in result.output


@pytest.mark.parametrize(
    "command", [["train"], ["config"], ["serve"], ["bench", "decode"], ["bench", "serve"]], ids=" ".join
)
def test_the_example_of_a_field_is_one_that_the_command_takes(command: list[str]) -> None:
    words = runner.invoke(app, [*command, "--help"], prog_name="raymoe").stdout.split()
    example = words[words.index("field,") + 3].rstrip(";")
    if "serve" in command:
        ServeConfig.load(None, [example])
    else:
        load_config(overrides=[example])


@pytest.mark.parametrize("module", ["jobs.cli.app", "typer"])
def test_ctrl_c_during_the_imports_of_the_script_ends_it_in_one_line(module: str) -> None:
    script = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from jobs.cli.main import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_while_options_are_read_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TyperGroup, "invoke", interrupted)
    result = runner.invoke(app, ["config"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("there", [False, True])
def test_a_stopped_start_names_the_runs_directory_only_if_it_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(train_command, "_training_config", stopped)
    output = tmp_path / "run"
    if there:
        output.mkdir()
    result = runner.invoke(app, ["train", "--output", str(output), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"interrupted": True, **({"output": str(output)} if there else {})}


def test_help_needs_neither_torch_nor_ray() -> None:
    script = (
        "import sys; from jobs.cli.app import app\n"
        "try:\n    app(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_reading_a_configuration_needs_neither_torch_nor_numba() -> None:
    script = (
        "import sys, jobs.config.run_config\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'numba', 'pandas')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def _ended(error: BaseException, *, debug: bool = False) -> int:
    @surfaced
    def command(debug: bool) -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command(debug=debug)
    return int(caught.value.exit_code)


def test_errors_end_with_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _ended(ConfigError("a: wrong\nb: wrong")) == 2
    assert _ended(ResourceError("no nodes")) == 1
    assert _ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: a: wrong\nerror: b: wrong\nerror: no nodes\ninterrupted\n"


def test_debug_and_errors_that_are_not_ours_keep_their_traceback() -> None:
    @surfaced
    def command(error: Exception, debug: bool) -> None:
        raise error

    with pytest.raises(ConfigError):
        command(ConfigError("x"), debug=True)
    with pytest.raises(ZeroDivisionError):
        command(ZeroDivisionError(), debug=False)


def test_an_error_of_ours_is_found_within_what_ray_wraps_around_it() -> None:
    class Wrapped(RaymoeError):  # as Ray makes them: also of our class, a traceback for its text
        def __init__(self, cause: Exception) -> None:
            super().__init__("Traceback …")
            self.cause = cause

        def as_instanceof_cause(self) -> None: ...

    inner = CheckpointError("c is damaged")
    outer = RuntimeError("user code failed")
    outer.__cause__ = Wrapped(inner)
    assert own_error(outer) is inner
    assert own_error(inner) is inner
    assert own_error(RuntimeError("no")) is None


def test_json_is_alone_on_stdout_and_has_no_nan() -> None:
    script = (
        "import os\nfrom jobs.console import finish\n"
        "def body():\n"
        "    print('chatter'); os.write(1, b'from C\\n'); os.system('echo from a child')\n"
        "    return {'loss': float('nan'), 'steps': (1, 2)}\n"
        "finish(body, as_json=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout) == {"loss": None, "steps": [1, 2]}
    assert done.stderr.splitlines() == ["from C", "from a child", "chatter"] or set(
        done.stderr.splitlines()
    ) == {
        "from C",
        "from a child",
        "chatter",
    }


def test_results_for_people_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    finish(lambda: {"loss": 1.25, "total_parameters": 1234567, "resumed": False}, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "loss              1.25",
        "total parameters  1,234,567",
        "resumed           no",
    ]


class ProgressClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _step(progress: Progress, step: int, **more: Any) -> None:
    progress.update(step, loss=2.5, tokens_per_second=1234.5, max_violation=0.25, **more)


def test_progress_without_a_terminal_is_a_line_every_few_seconds() -> None:
    clock, out = ProgressClock(), io.StringIO()
    with Progress(10, console=Console(file=out, width=60), clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 2.0
            _step(progress, step)
        progress.note("checkpoint at step 10, " + "x" * 60)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[1] == "step 4/10  loss 2.500  1,234 tok/s  MaxVio 0.25  0:12 left"
    assert lines[-1] == "checkpoint at step 10, " + "x" * 60


def test_progress_of_a_resumed_run_tells_the_time_by_its_own_steps() -> None:
    clock = ProgressClock()
    progress = Progress(100, console=Console(file=io.StringIO()), clock=clock)
    clock.now = 50.0  # until everything is up
    _step(progress, 90)
    assert progress.seconds_left() is None
    clock.now = 56.0
    _step(progress, 92)
    assert progress.seconds_left() == pytest.approx(24.0)


def test_progress_on_a_terminal_draws_a_bar() -> None:
    out = io.StringIO()
    with Progress(
        4, console=Console(file=out, force_terminal=True, width=120), clock=ProgressClock()
    ) as progress:
        _step(progress, 4, note="validation 2.1")
    assert "4/4" in out.getvalue()
    assert "validation 2.1" in out.getvalue()


@pytest.mark.parametrize("given", [[], ["host-1", "--node", "here"]])
def test_drain_takes_a_host_or_a_node(given: list[str]) -> None:
    result = runner.invoke(app, ["drain", *given])
    assert result.exit_code == 2
    assert "name one of them" in result.stderr
