"""The command line: `raymoe train | generate | eval | export | import | config | bench`.

What a command needs is imported when it runs, so that `raymoe --help` is fast.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from errors import ConfigError
from jobs.console import Progress, finish, surfaced

Result = Mapping[str, Any]

app = typer.Typer(
    name="raymoe",
    help="Train and serve DeepSeek-V3-style mixture-of-experts models on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure this machine or cluster.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Preset = Annotated[
    str | None, typer.Option("--preset", help="A configuration by name: tiny, demo, bench-20m, deepseek-v3.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A YAML file; `raymoe config` prints a complete one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=V", help="Change one field, such as training.steps=100; repeatable."),
]
Address = Annotated[
    str | None, typer.Option(help="A running Ray cluster, such as auto; without it, one just for this run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, alone on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the actors' logs.")]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A checkpoint, a run's directory, or a Hugging Face directory.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Compute threads; the machine's cores by default.")]


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"raymoe {version('raymoe')}")
    except PackageNotFoundError:  # run from a checkout, as `ray job submit --working-dir .` does
        print("raymoe (from source)")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command()
@surfaced
def train(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Short for --set training.steps=N.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run: checkpoints, metrics, tokenizer.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the run in this directory.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="CKPT|HF_DIR", help="Begin with these weights, at step 0.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model; without --preset and --config, the preset demo."""
    chosen = _training_config(preset, config, _with_steps(overrides, steps), resume=resume, init=init)
    directory = resume or output or Path("runs") / (preset or (config.stem if config else "demo"))

    def compute() -> Result:
        from jobs.train import train as run

        with Progress(chosen.training.steps) as progress:
            return run(
                chosen,
                output=directory,
                resume=resume is not None,
                init=init,
                address=address,
                progress=progress,
                debug=debug,
            )

    finish(compute, as_json=as_json)


@app.command()
@surfaced
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to go on with; - reads it from stdin.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the sampling.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a text."""
    text = sys.stdin.read() if prompt == "-" else prompt

    def compute() -> Result:
        from jobs.generate import generate as run

        return run(
            checkpoint, text, max_tokens=max_tokens, temperature=temperature, seed=seed, threads=threads
        )

    if as_json:
        finish(compute, as_json=True)
    else:
        result = compute()
        print(result["prompt"] + result["text"])


@app.command("eval")
@surfaced
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option(
            help="File, folder or glob, all of which is judged; without it, the run's held-out documents."
        ),
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Field that holds the text (JSONL, Parquet).")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; by default that of the run.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows judged at once.")] = 4,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge a model on documents: loss, perplexity, bits per byte beside zlib's, draft acceptance."""

    def compute() -> Result:
        from jobs.evaluate import evaluate as run

        return run(
            checkpoint,
            data,
            text_field=text_field,
            sequence_length=sequence_length,
            batch_size=batch_size,
            threads=threads,
        )

    finish(compute, as_json=as_json)


@app.command("export")
@surfaced
def export_(
    checkpoint: Checkpoint,
    target: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A new or empty directory.")],
    dtype: Annotated[
        str | None, typer.Option(help="Cast weights to float32, bfloat16 or float16; unchanged by default.")
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="With the MTP modules, or without.")] = True,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint as transformers and vLLM read it, without the training state."""

    def compute() -> Result:
        from jobs.convert import export_checkpoint

        return export_checkpoint(checkpoint, target, dtype=dtype, mtp=mtp)

    finish(compute, as_json=as_json)


@app.command("import")
@surfaced
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A DeepSeek-V3 model in Hugging Face form.")
    ],
    target: Annotated[Path, typer.Argument(metavar="CKPT", help="A new or empty directory.")],
    dtype: Annotated[
        str | None, typer.Option(help="Cast weights to float32, bfloat16 or float16; unchanged by default.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a Hugging Face model and write it as a checkpoint to train --init or generate from."""

    def compute() -> Result:
        from jobs.convert import import_checkpoint

        return import_checkpoint(source, target, dtype=dtype)

    finish(compute, as_json=as_json)


@app.command("config")
@surfaced
def config_(
    preset: Annotated[
        str | None, typer.Argument(help="tiny, demo (the default), bench-20m or deepseek-v3.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a complete configuration with comments; redirect it into a file for --config."""
    from jobs.config_file import load_config
    from jobs.presets import summary
    from jobs.yaml_text import commented_yaml

    chosen = load_config(path=config, preset_name=preset, overrides=overrides or ())
    if as_json:
        finish(lambda: {**chosen.to_dict(), "summary": summary(chosen)}, as_json=True)
        return
    counts = summary(chosen)
    print(
        f"# {counts['total_parameters']:,} parameters, {counts['active_parameters']:,} of them active; "
        f"{counts['tokens']:,} tokens to train on"
    )
    print(commented_yaml(chosen), end="")


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
    from jobs.config_file import load_config

    name = preset or (None if config else "bench-20m")
    chosen = load_config(path=config, preset_name=name, overrides=overrides or ())

    def compute() -> Result:
        from jobs.bench import bench_train as run

        return run(chosen, steps=steps)

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


def _with_steps(overrides: list[str] | None, steps: int | None) -> list[str]:
    return [*(overrides or ()), *([f"training.steps={steps}"] if steps else ())]


def _training_config(
    preset: str | None, config: Path | None, overrides: list[str], *, resume: Path | None, init: Path | None
) -> Any:
    """The configuration to train with: of the run that is resumed, or of the options."""
    from jobs.config_file import load_config, resumed_config

    if resume is None:
        return load_config(path=config, preset_name=preset, overrides=overrides)
    given = {"--preset": preset, "--config": config, "--init": init}
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ConfigError(
            f"--resume goes on with the run's own configuration and weights; leave out {', '.join(wrong)}, "
            "and use --set for what differs"
        )
    return resumed_config(resume, overrides)


def main() -> None:
    """Entry point of the `raymoe` script."""
    app()


if __name__ == "__main__":
    main()
