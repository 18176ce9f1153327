"""The Ray actors, which run expert hosts, coordinators and routers in processes, and calls to them.

Each actor is given a function that builds its plain class, so that weights and files are opened in the
process that uses them. An error of the build is raised by the first call of a method.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.coordinator.coordinator import Coordinator
from actors.coordinator.servicer import AdminServicer, CoordinatorServicer
from actors.host import ExpertHost
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
_LOOPBACKS = ("127.0.0.1", "[::1]", "localhost")
_T = TypeVar("_T")


class _Process(Generic[_T]):
    """An actor's process around a plain class.

    Args:
        build: Builds the plain class; None waits for `begin`.
        interface: Interface to listen on; see `listening_address`.
        port: Port to listen on; 0 takes a free one.
    """

    def __init__(self, build: Callable[[], _T] | None, interface: str | None = None, port: int = 0) -> None:
        self._interface = listening_address(interface)
        self._port = port
        self._error: Exception | None = None
        self._built: Any = None
        if build is not None:
            self.begin(build, port)

    def begin(self, build: Callable[[], _T], port: int) -> None:
        """Build the plain class and serve it."""
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
        """Stop serving; calls under way fail."""
        if self._built is not None:
            self._built.close()

    def ping(self) -> None:
        """Return, which shows that the process lives."""

    def lease(self) -> None:
        """Block for ever, so that the caller notices the end of the process."""
        threading.Event().wait()


class _ExpertHostProcess(_Process[ExpertHost]):
    def _open(self, plain: ExpertHost) -> ExpertHostServer:
        return ExpertHostServer(plain, bind=self._interface, node=_node_id())

    def info(self) -> HostInfo:
        """Description of the host, with its addresses."""
        info: HostInfo = self._running().info
        return info


class _CoordinatorProcess(_Process[Coordinator]):
    def _open(self, plain: Coordinator) -> ControlServer:
        self._coordinator = plain
        plain.actor = ray.get_runtime_context().get_actor_id() or ""

        def register(server: grpc.Server) -> None:
            coordinator_pb2_grpc.add_CoordinatorServicer_to_server(CoordinatorServicer(plain), server)
            admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(plain), server)

        # A thread for each worker's waiting call, and 64 for routers, the fleet and operators.
        return ControlServer(register, host=self._interface, port=self._port, threads=plain.workers + 64)

    def address(self) -> str:
        """Address for `CoordinatorClient`; empty as long as the process is on standby."""
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
        """Address of the service of router.proto."""
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
    node: str = "",
    **options: Any,
) -> Any:
    """Start one of the actors; returns its handle at once.

    Args:
        actor: The actor class.
        build: Builds the plain class in the actor's process; None waits for `begin`.
        interface: Interface to listen on; see `listening_address`.
        port: Port for control calls, for actors with such a port alone; 0 takes a free one.
        cpus, gpus: Reserved by Ray.
        node: Id of the node that is to take it; Ray finds another if it cannot. '' spreads over the nodes.
        options: Further options of Ray, such as `resources`.
    """
    there = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True) if node else "SPREAD"
    placed = {"scheduling_strategy": there, **options}
    return actor.options(num_cpus=cpus, num_gpus=gpus, **placed).remote(build, interface, port)


def ask(reference: Any, *, what: str, timeout: float | None = None) -> Any:
    """The result of an actor's method; errors of Ray become raymoe's.

    Args:
        reference: What the method's `remote` returned.
        what: Name of the actor in errors.
        timeout: Seconds to wait; None waits without a limit.

    Raises:
        ResourceError: There is no answer in time.
        RaymoeError: The actor raised it, or is dead.
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
    """The one line of a dead actor's error that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "creation task" in str(error) else lines[0] if lines else type(error).__name__


def listening_address(interface: str | None) -> str:
    """The address that a process of this node listens on, as it stands before a port: IPv6 in brackets.

    Args:
        interface: As in `cluster.interface`. None is the node's own address with TLS, else the loopback;
            `node` is the node's own address even without TLS.
    """
    address = interface or "127.0.0.1"
    if interface == OWN_ADDRESS or (interface is None and tls.directory() is not None):
        address = str(ray.util.get_node_ip_address())
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def require_reach(interface: str | None) -> None:
    """Check that the hosts of this Ray cluster can reach each other.

    Raises:
        ResourceError: The cluster has several machines, and hosts would listen on the loopback of each.
    """
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and listening_address(interface) in _LOOPBACKS:
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
