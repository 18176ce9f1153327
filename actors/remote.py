"""The only Ray actors: processes around the plain classes, and how to start and to ask them.

Each actor is given a function that builds its plain class, so that weights and files are opened where
they are used. A build that fails is kept and raised by the first call, with its class and text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.coordinator.coordinator import Coordinator
from actors.coordinator.servicer import AdminServicer, CoordinatorServicer
from actors.host.expert_host import ExpertHost
from actors.host.host_server import ExpertHostServer
from actors.process_heap import freeze_heap
from actors.router.gate_router import GateRouter
from actors.router.gate_servicer import RouterServicer
from actors.rpc.control_server import ControlServer
from channels.grpc import tls
from cluster.topology import HostInfo
from errors import RaymoeError, ResourceError
from protos import admin_pb2_grpc, coordinator_pb2_grpc, router_pb2_grpc

OWN_ADDRESS = "node"
_T = TypeVar("_T")


class _Process(Generic[_T]):
    """Builds once; remembers the error if that fails."""

    def __init__(self, build: Callable[[], _T] | None, interface: str | None = None, port: int = 0) -> None:
        self._interface = listening_address(interface)
        self._port = port
        self._error: Exception | None = None
        self._built: Any = None
        if build is not None:
            self.begin(build, port)

    def begin(self, build: Callable[[], _T], port: int) -> None:
        """Build, in a process that was started without anything to build."""
        self._port = port
        try:
            self._built = self._open(build())
            freeze_heap()
        except Exception as error:
            self._error = error

    def _open(self, plain: _T) -> Any:
        raise NotImplementedError

    def _running(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._built

    def close(self) -> None:
        """Hang up on every caller."""
        if self._built is not None:
            self._built.close()

    def ping(self) -> None:
        """Answers."""

    def lease(self) -> None:
        """Lasts as long as the process: whoever waits for it hears of its end."""
        threading.Event().wait()


class _ExpertHostProcess(_Process[ExpertHost]):
    def _open(self, plain: ExpertHost) -> ExpertHostServer:
        return ExpertHostServer(plain, bind=self._interface, node=_node_id())

    def info(self) -> HostInfo:
        """Where the host is reached."""
        info: HostInfo = self._running().info
        return info


class _CoordinatorProcess(_Process[Coordinator]):
    def _open(self, plain: Coordinator) -> ControlServer:
        self._coordinator = plain
        plain.actor = ray.get_runtime_context().get_actor_id() or ""

        def register(server: grpc.Server) -> None:
            coordinator_pb2_grpc.add_CoordinatorServicer_to_server(CoordinatorServicer(plain), server)
            admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(plain), server)

        # Every worker and router may wait for news, with room for whoever runs the hosts and the job.
        return ControlServer(register, host=self._interface, port=self._port, threads=plain.workers + 64)

    def address(self) -> str:
        """What `CoordinatorClient` takes; empty as long as the process stands by."""
        running = self._running()
        return "" if running is None else str(running.address)

    def close(self) -> None:
        if self._built is not None:
            self._coordinator.close()
        super().close()


class _RouterProcess(_Process[GateRouter]):
    def _open(self, plain: GateRouter) -> ControlServer:
        servicer = RouterServicer(plain)
        return ControlServer(
            lambda server: router_pb2_grpc.add_RouterServicer_to_server(servicer, server),
            host=self._interface,
            threads=32,
        )

    def address(self) -> str:
        """Where the service of router.proto listens."""
        address: str = self._running().address
        return address


ExpertHostActor = ray.remote(max_restarts=0, max_concurrency=4)(_ExpertHostProcess)
CoordinatorActor = ray.remote(max_restarts=0, max_concurrency=4)(_CoordinatorProcess)
RouterActor = ray.remote(max_restarts=0)(_RouterProcess)


def start(
    actor: Any,
    build: Callable[[], Any] | None,
    *,
    interface: str | None = None,
    port: int = 0,
    cpus: float = 0,
    gpus: float = 0,
    **options: Any,
) -> Any:
    """Start one of the actors, spread over the cluster's nodes; returns its handle at once.

    Args:
        build: makes the plain class; called in the actor's process. None: the process waits for `begin`.
        interface: that it listens on; see `listening_address`.
        port: that it listens on, where it has one for control calls alone; 0 takes a free one.
        cpus, gpus: what Ray reserves.
        options: further options of Ray, as `resources`.
    """
    placed = {"scheduling_strategy": "SPREAD", **options}
    return actor.options(num_cpus=cpus, num_gpus=gpus, **placed).remote(build, interface, port)


def ask(reference: Any, *, what: str, timeout: float | None = None) -> Any:
    """The result of an actor's method; errors are ours, with their text.

    Args:
        what: names the actor in an error.
        timeout: seconds.

    Raises:
        ResourceError: no answer in time.
        RaymoeError: what the actor raised, or the actor is dead.
    """
    try:
        return ray.get(reference, timeout=timeout)
    except GetTimeoutError:
        raise ResourceError(
            f"{what} did not answer within {timeout:g} s: the cluster may lack the CPUs or GPUs that "
            "cluster.cpus_per_host and cluster.gpus_per_host ask for, or loading takes longer than "
            "cluster.start_timeout"
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, RaymoeError):
            raise error.cause from None
        raise RaymoeError(f"{what} failed: {type(error.cause).__name__}: {error.cause}") from None
    except RayActorError as error:
        raise RaymoeError(f"{what} died: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """What a dead actor's error says, without Ray's page of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "creation task" in str(error) else lines[0] if lines else type(error).__name__


def listening_address(interface: str | None) -> str:
    """Where a process of this node listens (`cluster.interface`).

    Without TLS nobody else is meant to reach it, unless that is said: `node` is the node's own address.
    """
    if interface == OWN_ADDRESS or (interface is None and tls.directory() is not None):
        address: str = ray.util.get_node_ip_address()
        return address
    return interface or "127.0.0.1"


def require_reach(interface: str | None) -> None:
    """Whether hosts of this Ray cluster can reach one another.

    Raises:
        ResourceError: it has several machines, and hosts would listen on the loopback of each.
    """
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and listening_address(interface) == "127.0.0.1":
        raise ResourceError(
            f"the Ray cluster has {len(machines)} machines, and without TLS hosts listen on the loopback: "
            f"give all nodes {tls.VARIABLE} (see `raymoe certs`), or say cluster.interface={OWN_ADDRESS} for "
            "plain connections on a network that you trust"
        )


def _node_id() -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node


__all__ = [
    "CoordinatorActor",
    "ExpertHostActor",
    "RouterActor",
    "ask",
    "listening_address",
    "require_reach",
    "start",
]
