"""`make demo`: trains a small model for a few minutes, with experts on two hosts, and shows the result."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from jobs.config.run_config import RunConfig
from jobs.console import Progress, say, surfaced
from jobs.fleet.stop_signals import Stopped, StopSignals

_PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
_SAMPLE_TOKENS = 120
_TEMPERATURE = 0.6  # greedy decoding makes so small a model repeat itself


def main(
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run; runs/demo, runs/demo-2, … by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=V", help="Change one field; repeatable.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the actors' logs.")] = False,
) -> None:
    """Train the preset demo on the Python standard library; show figures, a plot and a sample."""
    _run(output or fresh_directory(Path("runs") / "demo"), overrides or [], debug=debug)


@surfaced
def _run(output: Path, overrides: list[str], *, debug: bool) -> None:
    console = Console(highlight=False)
    try:
        result = _trained(console, output, overrides, debug=debug)
    except Stopped:
        console.print("stopped before the first step; no checkpoint was written")
        return
    if result["interrupted"]:
        console.print(
            f"stopped at step {result['step']}; resume with: .venv/bin/raymoe train --resume {output}",
            soft_wrap=True,
        )
        return
    from jobs.tools.generate import generate
    from jobs.training.plot import plot_run

    say("loading the trained model, to write a sample with it")
    sample = generate(output, _PROMPT, max_tokens=_SAMPLE_TOKENS, temperature=_TEMPERATURE, note=say)
    picture = plot_run(output)
    console.print(summary_table(result))
    console.print(
        Panel(
            Syntax(sample["prompt"] + sample["text"], "python", theme="ansi_dark", word_wrap=True),
            title="what it writes after the first two lines",
            title_align="left",
        )
    )
    console.print(f"picture     {picture}", soft_wrap=True)
    console.print(f"checkpoint  {result['checkpoint']}", soft_wrap=True)
    console.print(f'next        .venv/bin/raymoe generate {output} --prompt "import "', soft_wrap=True)


def _trained(console: Console, output: Path, overrides: list[str], *, debug: bool) -> dict[str, Any]:
    say(f"loading what the demo needs; it trains a small model for a few minutes, into {output}")
    with StopSignals().watched() as stop:  # before what takes seconds to import
        from jobs.config.config_file import load_config
        from jobs.training.train import train

        config = load_config(preset_name="demo", overrides=overrides)
        console.print(opening(config), soft_wrap=True)
        with Progress(config.training.steps) as progress:
            return train(config, output=output, progress=progress, stop=stop, debug=debug)


def fresh_directory(wanted: Path) -> Path:
    """The directory itself, or the first of `<name>-2`, `<name>-3`, … that does not exist."""
    candidates = (wanted if i == 1 else wanted.with_name(f"{wanted.name}-{i}") for i in count(1))
    return next(path for path in candidates if not path.exists())


def opening(config: RunConfig) -> str:
    """One line that describes the model and the data."""
    from jobs.config.presets import summary

    counts, model = summary(config), config.model
    return (
        f"{counts['total_parameters'] / 1e6:.1f}M parameters, {counts['active_parameters'] / 1e6:.1f}M of "
        f"them active; {model.n_routed_experts} experts a layer on {config.cluster.expert_hosts} hosts, "
        f"{model.num_experts_per_tok} per token; {counts['tokens'] / 1e6:.2f}M tokens of "
        f"{config.data.path or 'the Python standard library'}"
    )


def summary_table(result: dict[str, Any]) -> Table:
    """The result of `jobs.training.train.train` as a table, with an explanation of each figure."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("training loss", f"{result['main_loss']:.3f}", "nats per token, last step")
    table.add_row("held-out loss", f"{result['validation_loss']:.3f}", "nats per token")
    table.add_row("held-out bits per byte", f"{result['bits_per_byte']:.3f}", "of documents never trained on")
    table.add_row("zlib -9", f"{result['zlib_bits_per_byte']:.3f}", "bits per byte of the same documents")
    table.add_row("tokens per second", f"{result['tokens_per_second']:,.0f}", "median of the second half")
    table.add_row(
        "MaxVio",
        f"{result['max_violation_mean']:.3f}",
        "(max - mean) / mean of the experts' load, mean over the layers and the second half",
    )
    for acceptance in result["mtp_acceptance"]:
        table.add_row("MTP acceptance", f"{acceptance:.1%}", "drafts that the main model agrees with")
    table.add_row("hosts per token", f"{result['hosts_per_token']:.2f}", "that a layer sends a token to")
    table.add_row("seconds", f"{result['seconds']:.0f}", "training and evaluation")
    return table


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()


__all__ = ["fresh_directory", "main", "opening", "summary_table"]
