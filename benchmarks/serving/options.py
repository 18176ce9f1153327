"""The options of `raymoe bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[
    str | None,
    typer.Argument(metavar="URL", help="URL of a running server; by default one is started for this run."),
]
ServedCheckpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Checkpoint for the server that is started; by default bench-20m with random weights.",
    ),
]
ServerConfig = Annotated[
    Path | None, typer.Option("--config", help="Configuration (YAML) of the server that is started.")
]
Rate = Annotated[
    str,
    typer.Option(
        "--rate",
        help="Requests per second; auto measures the server's capacity and offers the share --load of it.",
    ),
]
LoadShare = Annotated[
    float, typer.Option("--load", min=0.01, max=10, help="Share of the capacity to offer, with --rate auto.")
]
Requests = Annotated[int | None, typer.Option("--requests", min=1, help="Number of requests to send.")]
Duration = Annotated[
    float | None,
    typer.Option("--duration", min=0.1, help="Seconds to send requests for; 30 without --requests."),
]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", help="Text file with one prompt per line; by default prompts are random."),
]
PromptTokens = Annotated[
    str | None,
    typer.Option(
        "--prompt-tokens", metavar="A:B", help="Range of prompt lengths, in place of the default mix."
    ),
]
OutputTokens = Annotated[
    str | None,
    typer.Option(
        "--output-tokens", metavar="A:B", help="Range of output lengths, in place of the default mix."
    ),
]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, max=2.0, help="Sampling temperature.")]
Drops = Annotated[
    float,
    typer.Option("--drops", min=0.0, max=1.0, help="Share of requests that the client cancels midway."),
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos/--no-ignore-eos", help="Generate every request's full number of tokens."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of arrivals, lengths and prompts.")]
ProbeSeconds = Annotated[
    float,
    typer.Option(
        "--probe-seconds", min=0.1, help="Seconds at each concurrency while the capacity is measured."
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds after which a request fails.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        help="API key sent with every request. Others see arguments; RAYMOE_API_KEY or a file is better.",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="File with the API key in its first line. By default RAYMOE_API_KEY, or RAYMOE_API_KEYS_FILE.",
    ),
]

__all__ = [
    "ApiKey",
    "ApiKeyFile",
    "Drops",
    "Duration",
    "IgnoreEos",
    "LoadShare",
    "OutputTokens",
    "ProbeSeconds",
    "PromptTokens",
    "Prompts",
    "Rate",
    "Requests",
    "Seed",
    "ServedCheckpoint",
    "ServerConfig",
    "Temperature",
    "Timeout",
    "Url",
]
