"""The commands of `raymoe bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli_options import ConfigFile, Debug, Json, Overrides, Preset, Result
from jobs.console import finish, surfaced

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("train")
@surfaced
def bench_train(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each contender to time.")] = 15,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time training steps: experts in process, on hosts, and transformers; by default of bench-20m."""
    chosen = _config(preset, config, overrides)

    def compute() -> Result:
        from jobs.bench import bench_train as run

        return run(chosen, steps=steps)

    finish(compute, as_json=as_json)


@bench.command("decode")
@surfaced
def bench_decode(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time greedy decoding: experts in process, on hosts, and transformers; by default of bench-20m."""
    chosen = _config(preset, config, overrides)

    def compute() -> Result:
        from jobs.bench import bench_decode as run

        return run(chosen, rounds=rounds)

    finish(compute, as_json=as_json)


@bench.command("channel")
@surfaced
def bench_channel(
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="shm or grpc; repeatable, both by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which each kind has its turn.")] = 10,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time round trips between two processes of this machine, gRPC's beside a bare stream's."""

    def compute() -> Result:
        from jobs.bench import bench_channel as run

        return run(kinds or ["shm", "grpc"], rounds=rounds)

    finish(compute, as_json=as_json)


def _config(preset: str | None, config: Path | None, overrides: list[str] | None) -> Any:
    from jobs.config_file import load_config

    name = preset or (None if config else "bench-20m")
    return load_config(path=config, preset_name=name, overrides=overrides or ())


__all__ = ["bench"]
