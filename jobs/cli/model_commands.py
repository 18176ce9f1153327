"""The commands that need no Ray: `raymoe generate | eval | export | import | config`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from errors import DataError
from jobs.cli.options import Checkpoint, Debug, Generation, Json, Overrides, Result, Threads
from jobs.console import finish, say, surfaced


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    commands: dict[str, Callable[..., None]] = {
        "generate": generate,
        "eval": evaluate,
        "export": export_,
        "import": import_,
        "config": config_,
    }
    for name, command in commands.items():
        app.command(name)(surfaced(command))


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Largest number of tokens to generate; by default the model's, or 128."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Sampling temperature, 0 is greedy; by default the model's, or 0."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    generation_config: Generation = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a text."""
    text = _stdin_text() if prompt == "-" else _argument_text(prompt)
    _say_loading(checkpoint)

    def compute() -> Result:
        from jobs.tools.generate import generate as run

        return run(
            checkpoint,
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            generation_config=generation_config or "auto",
            threads=threads,
            note=say,
        )

    if as_json:
        finish(compute, as_json=True)
    else:
        result = compute()
        print(result["prompt"] + result["text"])


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option(
            help="File, folder or glob of documents; by default the documents that the run held out."
        ),
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Field or column with the text (JSONL, Parquet).")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per row; by default as in the run.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 4,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a model on documents: loss, perplexity, bits per byte, draft acceptance."""
    _say_loading(checkpoint)

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


def export_(
    checkpoint: Checkpoint,
    target: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A new or empty directory.")],
    dtype: Annotated[
        str | None, typer.Option(help="Cast weights to float32, bfloat16 or float16; by default unchanged.")
    ] = None,
    mtp: Annotated[
        bool,
        typer.Option("--mtp/--no-mtp", help="Include the MTP modules, for engines that draft with them."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint for transformers and vLLM, without the training state."""

    def compute() -> Result:
        from jobs.tools.convert import export_checkpoint

        return export_checkpoint(checkpoint, target, dtype=dtype, mtp=mtp)

    finish(compute, as_json=as_json)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A DeepSeek-V3 model in Hugging Face format.")
    ],
    target: Annotated[Path, typer.Argument(metavar="CKPT", help="A new or empty directory.")],
    dtype: Annotated[
        str | None, typer.Option(help="Cast weights to float32, bfloat16 or float16; by default unchanged.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a Hugging Face model and convert it into a checkpoint, to train from or generate with."""

    def compute() -> Result:
        from jobs.tools.convert import import_checkpoint

        return import_checkpoint(source, target, dtype=dtype)

    finish(compute, as_json=as_json)


def config_(
    preset: Annotated[
        str | None,
        typer.Argument(metavar="PRESET", help="Name: tiny, demo (the default), bench-20m or deepseek-v3."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Configuration file (YAML) to print with all fields.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a complete configuration with comments, as a file for --config."""
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


def _say_loading(checkpoint: Path) -> None:
    """Tell at once what the command does, before what takes seconds to import."""
    if checkpoint.exists():
        say(f"loading {checkpoint}")


def _argument_text(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        raise DataError("--prompt is not UTF-8; convert it, for instance with iconv") from None
    return prompt


def _stdin_text() -> str:
    if sys.stdin is None:
        raise DataError("--prompt - reads stdin, which is closed; give the text itself")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"--prompt is not UTF-8 (byte {error.start} of stdin); convert it, for instance with iconv"
        ) from None


__all__ = ["add_to"]
