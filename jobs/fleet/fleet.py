"""Starts, watches and ends the actors of a job: the coordinator and the expert hosts.

A fleet lives in the process that owns the job: the driver of a training run, or the pool of a deployment. Its
actors end with it. In a loop, it reports the state of the hosts to the coordinator and carries out the
coordinator's orders. If the coordinator dies, the fleet starts another one at the same address with the last
known state.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.coordinator.coordinator import Coordinator
from actors.host import ExpertHost
from actors.messages.coordinator_state import CoordinatorState
from actors.messages.job_identity import COORDINATOR, NAMESPACE, JobIdentity
from actors.remote import CoordinatorActor, ExpertHostActor, ask, require_reach, start
from actors.rpc.admin_client import AdminClient
from actors.rpc.coordinator_client import CoordinatorClient
from cluster.config import ClusterConfig
from errors import ChangeUnderWay, ConfigError, ProtocolError, RaymoeError, ResourceError
from jobs.fleet.fleet_actors import CoordinatorBuilder, HostActor, HostBuilder, kill
from jobs.fleet.job_notices import JobNotice, posted
from jobs.fleet.room import free_resources, lacking, nodes_to_take, resources_of_a_host, unreachable
from jobs.fleet.waiting import busy_note

_log = logging.getLogger(__name__)
_PAUSE = 0.1  # seconds between two reports
_LONGEST_PAUSE = 5.0  # between two tries to start a coordinator
_CALL_SECONDS = 10.0
_STANDBY_SECONDS = 5.0  # after which a job starts a standby coordinator; short jobs have none
_REFOLLOW_SECONDS = 30.0  # before a number of hosts that did not come about is asked for again
_ROOM_SECONDS = 1.0  # in which hosts that end give their resources back
_CENSUS_SECONDS = 2.0  # between two looks at the nodes of the cluster


@dataclass(slots=True)
class Fleet:
    """Runs a job's actors until `close`.

    Args:
        cluster: Number of hosts, and the resources of each.
        coordinator: Builds a coordinator in its own process, from the state of the one before.
        host: Builds the expert host of a name in its own process.
        name: Name of the job, for its operators.
    """

    cluster: ClusterConfig
    coordinator: Callable[[CoordinatorState | None], Coordinator]
    host: Callable[[str], ExpertHost]
    name: str = ""
    address: str = ""
    _coordinator: Any = None
    _client: CoordinatorClient | None = None
    _state: CoordinatorState | None = None
    _hosts: dict[str, HostActor] = field(default_factory=dict)
    _failed: dict[str, str] = field(default_factory=dict)
    _stopped: list[str] = field(default_factory=list)
    _next: int = 0
    _next_census: float = 0.0
    _followed: tuple[int | str, ...] = ()  # number of hosts last asked for, and the nodes at that time
    _refollow: float = 0.0
    _short_since: float | None = None
    _lacking: str = ""
    _job: JobIdentity = field(default_factory=JobIdentity)
    _notice: ExitStack = field(default_factory=ExitStack)
    _standby: Any = None
    _standby_at: float = math.inf
    _closing: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def open(self) -> str:
        """Start the coordinator and the hosts, and place all experts; return the coordinator's address.

        Raises:
            RaymoeError: One of them failed; all others are ended.
        """
        require_reach(self.cluster.interface)
        cluster = ray.get_runtime_context().gcs_address
        self._job = JobIdentity(id=uuid.uuid4().hex[:8], name=self.name, cluster=cluster)
        try:
            self._start_coordinator()
            self._start_hosts(self.cluster.expert_hosts)
            patience = self.cluster.start_timeout
            self._await_coordinator(patience)
            assert self._client is not None
            self._notice.enter_context(posted(JobNotice(**asdict(self._job), coordinator=self.address)))
            for id, host in self._hosts.items():
                host.info = ask(host.asked, what=f"expert host {id}", timeout=patience)
                self._client.register_host(host.info)
            if self._hosts:
                self._client.place_experts()
        except BaseException:
            self.close()
            raise
        self._standby_at = time.monotonic() + _STANDBY_SECONDS
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()
        return self.address

    def close(self) -> None:
        """End all actors."""
        self._closing.set()
        self._notice.close()
        if self._thread is not None:
            for actor in (self._coordinator, self._standby):  # otherwise the thread waits for its start
                kill(actor)
            self._thread.join()
        if self._client is not None:
            self._client.close()
        for actor in [self._coordinator, self._standby, *(host.actor for host in self._hosts.values())]:
            kill(actor)
        self._hosts.clear()

    # --- the loop

    def _run(self) -> None:
        while not self._closing.wait(_PAUSE):
            try:
                self._look()
                self._follow_nodes(self._obey())
                if self._standby is None and time.monotonic() > self._standby_at:
                    self._standby = self._coordinator_process(None)
            except RaymoeError:
                if not self._alive(self._coordinator):
                    self._replace_coordinator()
            except RayError:  # the Ray cluster is ending; the owner of this fleet notices
                continue

    def _look(self) -> None:
        """Find out which hosts have started, failed or ended."""
        assert self._client is not None
        leases = {host.lease: id for id, host in self._hosts.items()}
        ended, _ = ray.wait(list(leases), num_returns=max(1, len(leases)), timeout=0) if leases else ([], [])
        for lease in ended:
            id = leases[lease]
            self._failed[id] = self._why(self._hosts.pop(id))
        for id, host in list(self._hosts.items()):
            if host.info is not None:
                continue
            ready, _ = ray.wait([host.asked], timeout=0)
            try:
                if ready:
                    host.info = ask(host.asked, what=f"expert host {id}")
                    self._client.register_host(host.info)
                elif time.monotonic() - host.began > self.cluster.start_timeout:
                    raise RaymoeError(
                        f"it did not start within {self.cluster.start_timeout:g} s: the cluster may lack "
                        f"the {self.cluster.cpus_per_host:g} CPUs that cluster.cpus_per_host asks for"
                        f"{self._resources_asked()}{busy_note()}"
                    )
            except RaymoeError as error:
                refused = isinstance(error, ProtocolError)  # the coordinator has retired this host
                if host.info is not None and not refused and self._alive(host.actor):  # coordinator away
                    host.info = None
                    raise
                self._failed[id] = str(error)
                self._end(id)

    def _resources_asked(self) -> str:
        asked = ", ".join(f"{least:g} {name}" for name, least in self.cluster.host_resources.items())
        return f", or the {asked} of cluster.host_resources" if asked else ""

    def _follow_nodes(self, wanted: int) -> None:
        """Set the number of hosts to `cluster.hosts_per_node` for each node of the cluster."""
        if self.cluster.hosts_per_node is None or time.monotonic() < self._next_census:
            return
        self._next_census = time.monotonic() + _CENSUS_SECONDS
        asked = {"CPU": self.cluster.cpus_per_host, **self.cluster.host_resources}
        nodes = [
            node
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= least for name, least in asked.items())
        ]
        target = max(1, len(nodes) * self.cluster.hosts_per_node)
        wish = (target, *sorted(node["NodeID"] for node in nodes))
        if target != wanted and (wish != self._followed or time.monotonic() > self._refollow):
            self._followed, self._refollow = wish, time.monotonic() + _REFOLLOW_SECONDS
            admin = AdminClient(self.address, timeout=_CALL_SECONDS)
            try:
                why = (
                    f"{len(nodes)} Ray nodes with {self.cluster.hosts_per_node} each (cluster.hosts_per_node)"
                )
                admin.scale(target, timeout=0.0, why=why)
            except ChangeUnderWay:
                self._refollow = 0.0  # asked for again at the next census
            except (ConfigError, ResourceError):  # more hosts than experts, or it failed at once
                pass
            finally:
                admin.close()

    def _obey(self) -> int:
        """Report to the coordinator, carry out its orders, and return the number of hosts that it wants."""
        assert self._client is not None
        starting = sum(host.info is None for host in self._hosts.values())
        failed, stopped = dict(self._failed), list(self._stopped)
        if not starting:
            self._lacking = ""
        orders, wanted, self._state = self._client.orders(
            starting=starting, failed=failed, stopped=stopped, lacking=self._lacking
        )
        for id in failed:
            self._failed.pop(id)
        self._stopped = [id for id in self._stopped if id not in stopped]
        for id in orders.stop:
            self._end(id)
            self._stopped.append(id)
        unstarted = [id for id, host in self._hosts.items() if host.info is None]
        for id in unstarted[len(unstarted) - orders.cancel :]:
            self._end(id)
        if not orders.start:
            self._short_since = None
        elif self._may_start(orders.start):
            self._start_hosts(orders.start)
        return wanted

    def _may_start(self, hosts: int) -> bool:
        """Whether hosts are to be started now: with room, or when room has not come for a moment.

        Hosts without room are started too, since an autoscaler may add nodes for them.
        """
        missing = lacking(hosts, resources_of_a_host(self.cluster), list(free_resources().values()))
        now = time.monotonic()
        if not missing:
            self._short_since = None
            return True
        self._short_since = self._short_since or now
        if now - self._short_since < _ROOM_SECONDS:
            return False
        self._short_since, self._lacking = None, missing
        return True

    def _start_hosts(self, hosts: int) -> None:
        """Start hosts on the nodes that have the fewest; where none has room, wherever Ray finds it."""
        asked, free = resources_of_a_host(self.cluster), free_resources()
        there = [host.node for host in self._hosts.values()]
        nodes = nodes_to_take(hosts, asked, free, there)
        while lost := unreachable(set(nodes) - {""}):
            free = {node: resources for node, resources in free.items() if node not in lost}
            nodes = nodes_to_take(hosts, asked, free, there)
        for node in nodes:
            self._start_host(node)

    def _start_host(self, node: str) -> None:
        id = f"host-{self._next}"
        self._next += 1
        actor = start(
            ExpertHostActor,
            HostBuilder(self.host, id),
            interface=self.cluster.interface,
            cpus=self.cluster.cpus_per_host,
            gpus=self.cluster.gpus_per_host,
            resources=dict(self.cluster.host_resources),
            node=node,
        )
        self._hosts[id] = HostActor(actor, actor.info.remote(), actor.lease.remote(), time.monotonic(), node)

    def _end(self, id: str) -> None:
        host = self._hosts.pop(id, None)
        if host is not None:
            kill(host.actor)

    def _why(self, host: HostActor) -> str:
        try:
            ray.get(host.lease)
        except RayActorError:
            return "its process ended"
        except RayError as error:
            return str(error).strip().splitlines()[0]
        return "it ended"

    # --- the coordinator

    def _start_coordinator(self) -> None:
        build = CoordinatorBuilder(self.coordinator, self._state, self._job)
        standby, self._standby = self._standby, None
        if standby is None:
            self._coordinator = self._coordinator_process(build)
            return
        self._coordinator = standby
        self._standby_at = time.monotonic() + _STANDBY_SECONDS
        ask(
            standby.begin.remote(build, self._port),
            what="the coordinator",
            timeout=self.cluster.start_timeout,
        )

    @property
    def _port(self) -> int:
        return int(self.address.rpartition(":")[2]) if self.address else 0

    def _coordinator_process(self, build: Callable[[], Coordinator] | None) -> Any:
        """Start the actor of a coordinator, or with None that of a standby, which can take over quickly."""
        here = ray.get_runtime_context().get_node_id()
        return start(
            CoordinatorActor,
            build,
            interface=self.cluster.interface,
            port=self._port,
            # On the fleet's node, so that the address stays valid as long as the fleet can restart it.
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            name=f"{COORDINATOR}{uuid.uuid4().hex[:8]}",
            namespace=NAMESPACE,
        )

    def _await_coordinator(self, timeout: float) -> None:
        self.address = ask(self._coordinator.address.remote(), what="the coordinator", timeout=timeout)
        if self._client is None:
            self._client = CoordinatorClient(self.address, timeout=_CALL_SECONDS)

    def _replace_coordinator(self) -> None:
        """Start another coordinator at the same address, and register the hosts with it."""
        pause = _PAUSE
        while not self._closing.wait(pause):
            pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                kill(self._coordinator)  # it may hang and still occupy the port
                self._start_coordinator()
                self._await_coordinator(self.cluster.start_timeout)
                assert self._client is not None
                for host in self._hosts.values():
                    if host.info is not None:
                        self._client.register_host(host.info)
                self._client.place_experts()
                return
            except (RaymoeError, RayError) as error:  # hosts work without a coordinator; workers wait
                _log.warning("no coordinator has started at %s yet: %s", self.address, error)

    def _alive(self, actor: Any) -> bool:
        try:
            ray.get(actor.ping.remote(), timeout=_CALL_SECONDS)
        except RayError:
            return False
        return True


__all__ = ["Fleet"]
