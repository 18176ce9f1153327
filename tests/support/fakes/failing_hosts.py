"""Hosts over every kind of channel that die, hang or are slow in the middle of a call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from actors.host import ExpertHost
from actors.router import Router, RouterSettings
from actors.router.lane import Lane
from actors.router.mailbox_call import MailboxCall
from channels import choose, local
from channels.base import Channel, Request
from channels.collective import channel as collective
from channels.grpc import channel as grpc
from channels.shm import channel as shm
from channels.shm.mailbox import HostMailbox
from cluster.topology import HostInfo, RoutingTable
from errors import RaymoeError
from support.coordinator_tables import FakeTables
from support.tiny_cluster import CONFIG, LAYERS, TinyCluster, local_experts, tokens

KINDS = ["local", "shm", "mail", "collective", "grpc"]


REMOTE = KINDS[1:]  # whose peers can be silent; a call within a process ends when it returns


LONG = 600.0


"""Seconds, more than the time limit of a test: a test that ends has not waited for what takes as long."""


class FailingHost:
    """A host whose failures a test chooses."""

    def __init__(self, host: ExpertHost, kind: str) -> None:
        self.host = host
        self.before: Callable[[], None] = lambda: None
        self.silent = threading.Event()
        self.held = threading.Event()  # a request waits at the silent host
        self.go_on = threading.Event()
        if kind == "local":
            self.server: Any = local.serve(self.handle)
        elif kind == "grpc":
            self.server = grpc.serve(self.handle)
        elif kind == "collective":
            self.server = collective.serve(self.handle)
        else:
            self.server = shm.serve(self.handle, self.answer if kind == "mail" else None)
        self.info = HostInfo(id=host.id, addresses={"any": self.server.address})

    def handle(self, request: Request) -> tuple[Tensor, ...]:
        self._maybe_fail()
        return self.host.handle(request)

    def answer(self, box: HostMailbox) -> None:
        try:
            self._maybe_fail()
        except RaymoeError:
            box.reply(answered=False)
            return
        self.host.answer(box)

    def _maybe_fail(self) -> None:
        self.before()
        if self.silent.is_set():
            self.held.set()
            self.go_on.wait(LONG)

    def dies(self) -> None:
        """Close the server at the next request, which is not answered."""

        def dying() -> None:
            self.before = lambda: None
            threading.Thread(target=self.server.close, daemon=True).start()
            self.go_on.wait(0.3)  # the request is not answered before that

        self.before = dying


class FailoverCluster(TinyCluster):
    """Hosts of one kind of channel."""

    def __init__(self, kind: str, n_hosts: int, replicas: int) -> None:
        super().__init__(n_hosts, train=False, replicas=replicas)
        self.kind = kind
        self.sites = [FailingHost(host, kind) for host in self.hosts]
        self.infos = tuple(site.info for site in self.sites)
        self.tables = FakeTables(self.table(0))
        self.routers: list[Router] = []

    def connect(self, host: HostInfo) -> Channel:
        return choose.connect(host.addresses["any"], timeout=2.0)

    def ready(self, **settings: Any) -> Lane:
        """A lane that has made a call, through mailboxes if that is the kind."""
        router = Router(
            "replica",
            "run",
            CONFIG,
            self.tables.table,
            lambda host: self.connect(host),  # which a test may replace
            RouterSettings(**{"timeout": LONG, **settings}),
            tables=self.tables,
        )
        self.routers.append(router)
        lane = router.lane(0)
        local_experts().dispatch(LAYERS[0], *tokens(12)).combine()  # compiled before anything is timed
        while True:
            pending = lane.dispatch(LAYERS[0], *tokens(12))
            pending.combine()
            if self.kind != "mail" or isinstance(pending, MailboxCall):
                return lane

    def without(self, *lost: int, serial: int = 1) -> RoutingTable:
        """The table of the same epoch without some hosts."""
        left = [at for at in range(len(self.infos)) if at not in lost]
        return RoutingTable(
            epoch=0,
            hosts=tuple(self.infos[at] for at in left),
            holders=tuple(
                tuple(tuple(left.index(at) for at in hosts if at in left) for hosts in row)
                for row in self.holders
            ),
            serial=serial,
        )

    def close(self) -> None:
        for site in self.sites:
            site.go_on.set()
        for router in self.routers:
            router.close()
        for site in self.sites:
            site.server.close()
