"""The command `raymoe train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from errors import ConfigError
from jobs.cli.options import Address, ConfigFile, Debug, Json, Overrides, Preset, Result
from jobs.console import Progress, finish, say, surfaced
from jobs.fleet.stop_signals import Stopped, StopSignals


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(surfaced(train))


def train(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps, as --set training.steps=N.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run, for checkpoints, metrics and the tokenizer.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Resume the run in this directory.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="CKPT|HF_DIR", help="Start a new run with these weights.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Record a timeline of 3 steps (training.profile_steps).")
    ] = False,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model; by default the preset demo."""
    changes = [*(["training.profile_steps=3"] if profile else ()), *_with_steps(overrides, steps)]
    directory = resume or output or Path("runs") / (preset or (config.stem if config else "demo"))

    def compute() -> Result:
        with StopSignals().watched() as stop:
            chosen = _training_config(preset, config, changes, resume=resume, init=init, output=output)
            from jobs.training.train import train as run

            with Progress(chosen.training.steps) as progress:
                return run(
                    chosen,
                    output=directory,
                    resume=resume is not None,
                    init=init,
                    address=address,
                    progress=progress,
                    stop=stop,
                    debug=debug,
                )

    try:
        finish(compute, as_json=as_json)
    except Stopped:
        say("stopped before the first step; no checkpoint was written")
        made = {"output": str(directory)} if directory.exists() else {}
        finish(lambda: {"interrupted": True, **made}, as_json=as_json)


def _with_steps(overrides: list[str] | None, steps: int | None) -> list[str]:
    return [*(overrides or ()), *([f"training.steps={steps}"] if steps else ())]


def _training_config(
    preset: str | None,
    config: Path | None,
    overrides: list[str],
    *,
    resume: Path | None,
    init: Path | None,
    output: Path | None,
) -> Any:
    """The configuration of the resumed run, or the one that the options describe."""
    from jobs.config.config_file import load_config
    from jobs.training.resumed_config import resumed_config

    if resume is None:
        return load_config(path=config, preset_name=preset, overrides=overrides)
    given = {"--preset": preset, "--config": config, "--init": init, "--output": output}
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ConfigError(
            f"--resume uses the run's own configuration and weights; leave out {', '.join(wrong)}, "
            "and use --set for what differs"
        )
    return resumed_config(resume, overrides, note=say)


__all__ = ["add_to"]
