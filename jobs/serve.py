"""`raymoe serve`: brings a model up on Ray Serve, waits, and takes it down."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from ray import serve as ray_serve
from ray.serve.config import HTTPOptions

from errors import ConfigError, ResourceError
from jobs.hosts import on_loopback
from jobs.ray_session import Needs, ray_session
from jobs.serving.config import ServeConfig
from jobs.serving.deployment import app, build_application
from jobs.tokenizer import load_tokenizer
from jobs.weights import find_weights
from model.sources import PretrainedSource

_NAME = "raymoe"


def serve(
    config: ServeConfig,
    checkpoint: Path,
    *,
    host: str,
    port: int,
    address: str | None,
    ready: Callable[[str], None],
    debug: bool = False,
) -> None:
    """Serve a checkpoint until Ctrl-C or SIGTERM, which lets requests under way end.

    Args:
        host, port: where HTTP listens.
        address: of a running Ray cluster; None embeds one.
        ready: is told the URL when requests are answered.

    Raises:
        RaymoeError: with the text of whatever failed.
    """
    directory = find_weights(checkpoint).resolve()
    # What can be found wrong is found before anything starts.
    source = PretrainedSource(directory)
    source.check()
    model = source.config
    load_tokenizer(directory, model.vocab_size)
    if config.cluster.expert_hosts > model.n_routed_experts:
        raise ConfigError(
            f"cluster.expert_hosts ({config.cluster.expert_hosts}) is more than the model's "
            f"{model.n_routed_experts} routed experts: a host would own none; lower it"
        )
    with ray_session(_needs(config), address=address, debug=debug) as embedded:
        if embedded:
            config = config.model_copy(update={"cluster": on_loopback(config.cluster)})
        ray_serve.start(http_options=HTTPOptions(host=host, port=port))
        stop = threading.Event()
        # Not before: Ray, when it starts, sets a handler of its own for SIGTERM.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        try:
            _run(config, directory)
            ready(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}")
            stop.wait()
        finally:
            ray_serve.delete(_NAME)


def _run(config: ServeConfig, directory: Path) -> None:
    try:
        ray_serve.run(build_application(config, directory), name=_NAME, route_prefix="/")
    except RuntimeError as error:
        raise ResourceError(f"the model does not come up: {_cause(error)}") from error


def _cause(error: RuntimeError) -> str:
    """What the replicas failed with, which Serve tells in its status, tracebacks and all."""
    status = ray_serve.status().applications[_NAME]
    told = "\n".join([str(error), *(deployment.message for deployment in status.deployments.values())])
    ours = re.findall(r"^(?:ray::.*)?errors\.\w+: (.+)$", told, flags=re.MULTILINE)
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return str(ours[-1] if ours else lines[-1])


def _needs(config: ServeConfig) -> Needs:
    serving, cluster = config.serving, config.cluster
    return Needs(
        cpus=serving.replicas * serving.cpus_per_replica + cluster.expert_hosts * cluster.cpus_per_host,
        why=f"serving.replicas ({serving.replicas}) x serving.cpus_per_replica ({serving.cpus_per_replica:g})"
        f" + cluster.expert_hosts ({cluster.expert_hosts}) x cluster.cpus_per_host"
        f" ({cluster.cpus_per_host:g})",
    )


__all__ = ["app", "serve"]
