"""The commands that start and reload a served model: `raymoe serve | reload`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import Address, Checkpoint, Cluster, Debug, Generation, Job, Json, ServeOverrides
from jobs.console import announcing, finish, say, surfaced
from jobs.fleet.stop_signals import Stopped, StopSignals
from jobs.serving.ports import ListenAddress


def add_to(app: typer.Typer) -> None:
    """Register these commands."""
    for command in (serve, reload):
        app.command()(surfaced(command))


def serve(
    checkpoint: Checkpoint,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Configuration file (YAML) with the sections serving and cluster."),
    ] = None,
    overrides: ServeOverrides = None,
    host: Annotated[str, typer.Option(help="Network interface for HTTP.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port for HTTP.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port for gRPC; by default gRPC is off.")
    ] = None,
    generation_config: Generation = None,
    address: Address = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve a model with an OpenAI-compatible interface until Ctrl-C."""
    from jobs.fleet.ray_address import named_address

    given = [] if generation_config is None else [f"serving.generation_config={generation_config}"]
    changes = [*(overrides or []), *given]
    listen = ListenAddress(host=host, port=port, grpc_port=grpc_port)
    if named_address(address) is None:
        listen.check_free()  # before what takes seconds to import
    try:
        with StopSignals().watched() as stop:
            _serve(checkpoint, config, changes, listen, address, stop, as_json=as_json, debug=debug)
    except Stopped:
        say("stopped before the model was served")


def _serve(
    checkpoint: Path,
    config: Path | None,
    overrides: list[str],
    listen: ListenAddress,
    address: str | None,
    stop: StopSignals,
    *,
    as_json: bool,
    debug: bool,
) -> None:
    from dataclasses import asdict

    from jobs.serving.config import ServeConfig
    from jobs.serving.serve import Endpoints
    from jobs.serving.serve import serve as run

    chosen = ServeConfig.load(config, overrides)

    with announcing() as announce:

        def ready(at: Endpoints) -> None:
            if as_json:
                announce(asdict(at))
            else:
                also = "" if at.grpc is None else f" and, by gRPC, {at.grpc}"
                print(f"serving at {at.url}/v1{also}; Ctrl-C stops it", flush=True)

        run(chosen, checkpoint, listen=listen, address=address, ready=ready, stop=stop, debug=debug)


def reload(
    checkpoint: Checkpoint,
    address: Cluster = None,
    job: Job = None,
    application: Annotated[
        str | None,
        typer.Option("--app", help="Name of the Serve application; by default any that serves a model."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Replace the weights of a served model without interrupting it."""
    from jobs.tools.served_models import reload_served

    done = reload_served(checkpoint, address=address, job=job, application=application, tell=say, debug=debug)
    if as_json:
        finish(lambda: done, as_json=True)
    elif done["version"] == done["previous"]:
        print(f"{done['version']} is served already")
    else:
        print(
            f"{done['version']} in place of {done['previous']}, on {done['replicas']} replicas and "
            f"{done['expert_hosts']} expert hosts, in {done['seconds']:.1f} s"
        )


__all__ = ["add_to"]
