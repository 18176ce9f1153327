"""The commands of `raymoe bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.serving import options as serve_options
from errors import ConfigError
from jobs.cli.options import (
    Checkpoint,
    ConfigFile,
    Debug,
    Json,
    ModelOverrides,
    Overrides,
    Preset,
    Result,
    ServeOverrides,
)
from jobs.console import finish, say, surfaced

Device = Annotated[str, typer.Option(help="Device of all contenders: cpu, or cuda for one GPU.")]
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("train")
@surfaced
def bench_train(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each contender.")] = 15,
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time training steps, by default of bench-20m: experts in process, experts on hosts, transformers."""
    chosen = _config(preset, config, overrides)

    def compute() -> Result:
        from benchmarks.train import bench_train as run

        return run(chosen, steps=steps, device=device)

    finish(compute, as_json=as_json)


@bench.command("decode")
@surfaced
def bench_decode(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: ModelOverrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which the contenders alternate.")] = 5,
    device: Device = "cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time greedy decoding, by default of bench-20m: experts in process, experts on hosts, transformers."""
    chosen = _config(preset, config, overrides)

    def compute() -> Result:
        from benchmarks.decode import bench_decode as run

        return run(chosen, rounds=rounds, device=device)

    finish(compute, as_json=as_json)


@bench.command("experts")
@surfaced
def bench_experts(
    device: Device = "cpu",
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 7168,
    width: Annotated[
        int, typer.Option(min=1, help="Inner size of an expert (moe_intermediate_size).")
    ] = 2048,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer on a host.")] = 8,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows per expert; by default 4,096 on GPUs, 256 on CPUs.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which the contenders alternate.")] = 5,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the experts of a layer, by default in DeepSeek-V3's shape, against dense matrix products."""

    def compute() -> Result:
        from benchmarks.experts import bench_experts as run

        return run(device=device, hidden=hidden, width=width, experts=experts, rows=rows, rounds=rounds)

    finish(compute, as_json=as_json)


@bench.command("drafts")
@surfaced
def bench_drafts(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None, typer.Option(help="Documents to continue; by default those that the run held out.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of documents.")] = 20,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time decoding with and without MTP drafts, with experts in process and on hosts."""

    def compute() -> Result:
        from benchmarks.drafts import bench_drafts as run

        return run(checkpoint, data, prompts=prompts, temperature=temperature, note=say)

    finish(compute, as_json=as_json)


@bench.command("channel")
@surfaced
def bench_channel(
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="shm, collective or grpc; repeatable; by default all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which the kinds alternate.")] = 10,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time round trips over each kind of channel between two processes of this machine."""

    def compute() -> Result:
        from benchmarks.channel import bench_channel as run

        return run(kinds or ["shm", "collective", "grpc"], rounds=rounds)

    finish(compute, as_json=as_json)


@bench.command("overlap")
@surfaced
def bench_overlap(
    channel: Annotated[
        str, typer.Option(help="Channel, as cluster.channel: auto, shm, collective or grpc.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which the contenders alternate.")] = 4,
    sequences: Annotated[
        int, typer.Option(min=32, max=65536, help="Sequences decoded at the same time.")
    ] = 2048,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time training and decoding with and without overlap of trunk and experts."""

    def compute() -> Result:
        from benchmarks.overlap import bench_overlap as run

        return run(channel=channel, rounds=rounds, sequences=sequences)

    finish(compute, as_json=as_json)


@bench.command("serve")
@surfaced
def bench_serve(
    url: serve_options.Url = None,
    checkpoint: serve_options.ServedCheckpoint = None,
    config: serve_options.ServerConfig = None,
    overrides: ServeOverrides = None,
    rate: serve_options.Rate = "auto",
    share: serve_options.LoadShare = 0.8,
    requests: serve_options.Requests = None,
    duration: serve_options.Duration = None,
    prompts: serve_options.Prompts = None,
    prompt_tokens: serve_options.PromptTokens = None,
    output_tokens: serve_options.OutputTokens = None,
    temperature: serve_options.Temperature = 0.0,
    drops: serve_options.Drops = 0.0,
    ignore_eos: serve_options.IgnoreEos = True,
    seed: serve_options.Seed = 0,
    probe_seconds: serve_options.ProbeSeconds = 10.0,
    timeout: serve_options.Timeout = 600.0,
    api_key: serve_options.ApiKey = None,
    api_key_file: serve_options.ApiKeyFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Send randomly arriving requests to a server, and measure its latencies and throughput."""
    from benchmarks.serving.load_test import Load
    from benchmarks.serving.progress import ProgressLine
    from benchmarks.serving.request_mix import mix_of, rate_of
    from jobs.api.api_keys import client_key

    if url is not None and (checkpoint or config or overrides):
        raise ConfigError("--checkpoint, --config and --set are for a server of its own; leave out URL")
    load = Load(
        rate=rate_of(rate),
        share=share,
        requests=requests,
        duration=30.0 if duration is None and requests is None else duration,
        mix=mix_of(
            prompts,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            temperature=temperature,
            drops=drops,
            seed=seed,
        ),
        probe_seconds=probe_seconds,
        ignore_eos=ignore_eos,
        timeout=timeout,
        api_key=api_key or client_key(api_key_file),
    )
    options = [*(["--config", str(config)] if config else ()), *(f"--set={text}" for text in overrides or ())]

    def compute() -> Result:
        from benchmarks.serving.load_test import bench_serve as run

        with ProgressLine() as show:
            return run(url, load, checkpoint=checkpoint, options=options, show=show)

    finish(compute, as_json=as_json)


def _config(preset: str | None, config: Path | None, overrides: list[str] | None) -> Any:
    from jobs.config.config_file import load_config

    name = preset or (None if config else "bench-20m")
    return load_config(path=config, preset_name=name, overrides=overrides or ())


__all__ = ["bench"]
