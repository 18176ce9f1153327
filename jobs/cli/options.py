"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Result = Mapping[str, Any]
"""The result of a command, which is printed."""

Preset = Annotated[
    str | None,
    typer.Option("--preset", help="Name of a configuration: tiny, demo, bench-20m or deepseek-v3."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file (YAML); `raymoe config` prints a complete one."),
]


def _set(example: str) -> Any:
    return typer.Option("--set", metavar="A.B=V", help=f"Set one field, such as {example}; repeatable.")


Overrides = Annotated[list[str] | None, _set("training.steps=100")]
ServeOverrides = Annotated[list[str] | None, _set("cluster.expert_hosts=4")]
ModelOverrides = Annotated[list[str] | None, _set("model.n_routed_experts=32")]
Address = Annotated[
    str | None,
    typer.Option(help="Address of a running Ray cluster, or auto; by default one is started for this run."),
]
Cluster = Annotated[
    str | None,
    typer.Option("--address", help="Address of the job's Ray cluster; by default those of this machine."),
]
Job = Annotated[
    str | None,
    typer.Option(
        "--job", metavar="NAME|ID", help="Which job, where several run; a command without it lists them."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, alone on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the actors' logs.")]
Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CKPT", help="A checkpoint, a run's directory, or a Hugging Face directory."),
]
Generation = Annotated[
    Literal["auto", "none"] | None,
    typer.Option(
        "--generation-config",
        help="auto: take sampling defaults from the model's generation_config.json; none: leave it out.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Compute threads; by default one for each core.")
]

__all__ = [
    "Address",
    "Checkpoint",
    "Cluster",
    "ConfigFile",
    "Debug",
    "Generation",
    "Job",
    "Json",
    "ModelOverrides",
    "Overrides",
    "Preset",
    "Result",
    "ServeOverrides",
    "Threads",
]
