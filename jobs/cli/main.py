"""The command line: `raymoe train | serve | status | scale | generate | eval | export | …`.

What a command needs is imported when it runs, so that `raymoe --help` is fast.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from errors import ConfigError, DataError
from jobs.cli.job_commands import add_to
from jobs.cli.options import (
    Address,
    Checkpoint,
    ConfigFile,
    Debug,
    Json,
    Overrides,
    Preset,
    Result,
    Threads,
)
from jobs.console import Progress, announcing, finish, say, surfaced

app = typer.Typer(
    name="raymoe",
    help="Train and serve DeepSeek-V3-style mixture-of-experts models on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # errors of usage as plain lines, not in a box
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(import_module("benchmarks.cli").bench, name="bench")  # a layer above this one


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
    profile: Annotated[
        bool, typer.Option("--profile", help="Record a timeline of 3 steps (training.profile_steps).")
    ] = False,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model; without --preset and --config, the preset demo."""
    if address is not None:
        from jobs.fleet.ray_token import use_own_token

        use_own_token()
    changes = [*(["training.profile_steps=3"] if profile else ()), *_with_steps(overrides, steps)]
    chosen = _training_config(preset, config, changes, resume=resume, init=init, output=output)
    directory = resume or output or Path("runs") / (preset or (config.stem if config else "demo"))

    def compute() -> Result:
        from jobs.training.train import train as run

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
def serve(
    checkpoint: Checkpoint,
    config: Annotated[Path | None, typer.Option("--config", help="YAML with serving and cluster.")] = None,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Interface that HTTP listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of HTTP.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of gRPC; without it there is none.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI clients, until Ctrl-C."""
    if address is not None:
        from jobs.fleet.ray_token import use_own_token

        use_own_token()
    from dataclasses import asdict

    from jobs.serving.config import ServeConfig
    from jobs.serving.serve import Endpoints
    from jobs.serving.serve import serve as run

    chosen = ServeConfig.load(config, overrides or [])

    with announcing() as announce:

        def ready(at: Endpoints) -> None:
            if as_json:
                announce(asdict(at))
            else:
                also = "" if at.grpc is None else f" and, by gRPC, {at.grpc}"
                print(f"serving at {at.url}/v1{also}; Ctrl-C stops it", flush=True)

        run(
            chosen,
            checkpoint,
            host=host,
            port=port,
            grpc_port=grpc_port,
            address=address,
            ready=ready,
            debug=debug,
        )


@app.command()
@surfaced
def reload(
    checkpoint: Checkpoint,
    address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster that serves; by default the one that runs on this machine."),
    ] = None,
    name: Annotated[str, typer.Option("--app", help="The Serve application.")] = "raymoe",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Change the weights of a model that is served, without a pause or a lost request."""
    from jobs.fleet.ray_token import use_own_token

    use_own_token()
    from jobs.serving.reload import reload as run

    done = run(checkpoint, address=address, name=name, debug=debug)
    if as_json:
        finish(lambda: done, as_json=True)
    elif done["version"] == done["previous"]:
        print(f"{done['version']} is served already")
    else:
        print(
            f"{done['version']} in place of {done['previous']}, on {done['replicas']} replicas and "
            f"{done['expert_hosts']} expert hosts, in {done['seconds']:.1f} s"
        )


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
    text = _stdin_text() if prompt == "-" else prompt

    def compute() -> Result:
        from jobs.tools.generate import generate as run

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
        from jobs.tools.evaluate import evaluate as run

        return run(
            checkpoint,
            data,
            text_field=text_field,
            sequence_length=sequence_length,
            batch_size=batch_size,
            threads=threads,
            note=say,
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
    mtp: Annotated[
        bool, typer.Option("--mtp/--no-mtp", help="With the MTP modules, for engines that draft with them.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint as transformers and vLLM read it, without the training state."""

    def compute() -> Result:
        from jobs.tools.convert import export_checkpoint

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
        from jobs.tools.convert import import_checkpoint

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
    from jobs.config.config_file import load_config
    from jobs.config.presets import summary
    from jobs.config.yaml_text import commented_yaml

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


def _stdin_text() -> str:
    if sys.stdin is None:
        raise DataError("--prompt - reads stdin, which is closed; give the text itself")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"--prompt is not UTF-8 (byte {error.start} of stdin); convert it, for instance with iconv"
        ) from None


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
    """The configuration to train with: of the run that is resumed, or of the options."""
    from jobs.config.config_file import load_config
    from jobs.training.resumed_config import resumed_config

    if resume is None:
        return load_config(path=config, preset_name=preset, overrides=overrides)
    given = {"--preset": preset, "--config": config, "--init": init, "--output": output}
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ConfigError(
            f"--resume goes on with the run's own configuration and weights; leave out {', '.join(wrong)}, "
            "and use --set for what differs"
        )
    return resumed_config(resume, overrides)


add_to(app)


def main() -> None:
    """Entry point of the `raymoe` script."""
    app()
