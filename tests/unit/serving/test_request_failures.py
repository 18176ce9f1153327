"""A request that fails at a replica for a reason of its own ends there, and its replica serves on."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import grpc
import pytest

from engine.params import SamplingParams
from errors import ChannelError, DataError, RequestFailed, ResourceError
from jobs.serving.interface.replica_connection import ReplicaConnection
from jobs.serving.interface.replica_leases import ReplicaLease
from jobs.serving.interface.replicas import Replicas
from jobs.serving.interface.resumable_requests import ResumableRequests
from jobs.serving.replica.held_leases import HeldLeases
from jobs.serving.replica.trunk_server import TrunkService
from jobs.serving.trunk_messages import sampling_message
from protos.trunk_pb2 import TrunkRequest, TrunkStatus
from protos.trunk_pb2_grpc import add_TrunkServicer_to_server


class FailingService:
    """A fake of the engine's service that takes no request."""

    def __init__(self, error: Exception, *, at_once: bool) -> None:
        self._error, self._at_once = error, at_once
        self.asked = 0

    def submit(self, *_: Any, **__: Any) -> Future[None]:
        self.asked += 1
        if self._at_once:
            raise self._error
        taken: Future[None] = Future()
        taken.set_exception(self._error)
        return taken

    def cancel(self, id: str) -> None: ...


@pytest.mark.parametrize(
    ("error", "at_once", "kind", "text"),
    [
        (DataError("the tokenizer cannot decode the tokens"), False, RequestFailed, "cannot decode"),
        (ValueError("7 is no token"), True, RequestFailed, "ValueError: 7 is no token"),
        (ResourceError("the engine is closed"), True, ChannelError, "is closed"),
    ],
    ids=["its tokens", "unforeseen", "the replica"],
)
def test_only_what_fails_with_its_replica_is_tried_at_another_one(
    error: Exception, at_once: bool, kind: type[Exception], text: str
) -> None:
    async def check() -> None:
        service = FailingService(error, at_once=at_once)
        server = grpc.aio.server()
        served: Any = service
        add_TrunkServicer_to_server(TrunkService(served, HeldLeases(), lambda _: TrunkStatus()), server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        connection = ReplicaConnection(address, dead_after=20.0)
        message = TrunkRequest(id="one", prompt=[5], sampling=sampling_message(SamplingParams()))
        with pytest.raises(kind, match=text):
            await anext(connection.generate(message))
        assert connection.lost is None
        await connection.close()
        if kind is RequestFailed:
            await through_the_interface(address, service, text)
        await server.stop(None)

    async def through_the_interface(address: str, service: FailingService, text: str) -> None:
        lost: list[str] = []

        class Leases:
            async def take(self) -> ReplicaLease:
                return ReplicaLease(name="lease", address=address, began=0.0)

            def give_back(self, lease: ReplicaLease) -> None: ...

            def lost(self, lease: ReplicaLease) -> None:
                lost.append(lease.name)

        async def known() -> dict[str, str]:
            return {}

        service.asked = 0
        trunks = ResumableRequests(Replicas(Leases(), known, dead_after=20.0), vocabulary=1000, patience=20.0)
        deltas: asyncio.Queue[Any] = asyncio.Queue()
        await trunks.submit("one", [5], SamplingParams(), deltas.put_nowait)
        delta = await deltas.get()
        assert text in delta.error and delta.own
        assert (service.asked, lost) == (1, [])
        await trunks.close()

    asyncio.run(asyncio.wait_for(check(), 60))
