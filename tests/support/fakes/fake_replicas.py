"""Fake replicas of the trunk that answer over gRPC and fail where a test says so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from engine.delta import Delta
from engine.params import SamplingParams
from jobs.serving.interface.replica_leases import ReplicaLease
from jobs.serving.interface.replicas import Replicas
from jobs.serving.interface.resumable_requests import ResumableRequests
from protos.trunk_pb2 import TrunkDelta, TrunkRequest, TrunkStatus
from protos.trunk_pb2_grpc import TrunkServicer, add_TrunkServicer_to_server

PROMPT = [5, 6, 7]


COUNT = 12


VOCABULARY = 1000


PARAMS = SamplingParams(max_tokens=COUNT, temperature=0.0)


def token(prompt: list[int], output: list[int], seed: str) -> int:
    """The next token, a function of prompt, output and seed as an engine's is."""
    return random.Random(f"{prompt}{output}{seed}").randrange(VOCABULARY)


def expected(prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    output: list[int] = []
    while len(output) < params.max_tokens:
        output.append(token(prompt, output, "" if params.seed is None else str(params.seed)))
    return output


class Fake(TrunkServicer):
    """A fake replica; `plan` maps a number of tokens to the fault that follows it, once."""

    def __init__(self, plan: dict[int, str]) -> None:
        self.plan = plan
        self.server: Any = None
        self._stopping: asyncio.Task[None] | None = None
        self.hung = asyncio.Event()
        self.asked: list[TrunkRequest] = []
        self.cancelled = 0
        self.status_calls = 0
        self.version = "v1"
        self.unwell = ""
        self.answered = 0  # number of status calls answered

    async def Generate(self, request: TrunkRequest, context: Any) -> None:  # type: ignore[override]
        self.asked.append(request)
        output = list(request.output)
        try:
            await self._trouble(-1, context)
            await context.write(TrunkDelta())
            while True:
                await self._trouble(len(output), context)
                output.append(token(list(request.prompt), output, request.sampling.seed))
                reason = "length" if len(output) == request.sampling.max_tokens else ""
                delta = TrunkDelta(
                    text=f"{output[-1]} ",
                    tokens=output[-1:],
                    finish_reason=reason,
                    cached=0 if request.output else 2,
                    version=self.version,
                )
                await context.write(delta)
                if reason:
                    return
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def Status(self, request: Any, context: Any) -> TrunkStatus:
        self.status_calls += 1
        if self.hung.is_set():
            await asyncio.sleep(3600)
        self.answered += 1
        return TrunkStatus(version=self.version, running=3, pages=7, unwell=self.unwell)

    def stop(self) -> asyncio.Task[None]:
        """Stop the server and end all its calls."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self.server.stop(None))
        return self._stopping

    async def _trouble(self, at: int, context: Any) -> None:
        what = self.plan.pop(at, None)
        if what == "dies":
            self.stop()
            await asyncio.sleep(3600)
        elif what == "hangs":
            self.hung.set()
            await asyncio.sleep(3600)
        elif what == "ends":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this replica ends")
        elif what == "breaks off":
            raise RuntimeError("something unforeseen")
        elif what == "refuses":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt is not to its taste")
        elif what == "is full":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "3 requests are waiting already")
        elif what == "fails":
            await context.write(TrunkDelta(error="expert host host-1 is gone"))
            await asyncio.sleep(3600)


@dataclass
class Scene:
    """Replicas in the order in which they are picked; the last one is picked from then on."""

    plans: list[dict[int, str]]
    fakes: list[Fake] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    picks: int = 0
    absent: float = 0.0
    listed: bool = False
    given_back: list[str] = field(default_factory=list)
    lost_ones: list[str] = field(default_factory=list)

    async def known(self) -> dict[str, str]:
        return {f"app#trunk#{i}": address for i, address in enumerate(self.addresses) if self.listed}

    async def take(self) -> ReplicaLease:
        if self.picks and self.absent:
            await asyncio.sleep(self.absent)
        at = min(self.picks, len(self.addresses) - 1)
        self.picks += 1
        return ReplicaLease(name=f"lease-{self.picks}", address=self.addresses[at], began=0.0)

    def give_back(self, lease: ReplicaLease) -> None:
        self.given_back.append(lease.name)

    def lost(self, lease: ReplicaLease) -> None:
        self.lost_ones.append(lease.name)

    @asynccontextmanager
    async def running(
        self, *, patience: float = 20.0, dead_after: float = 20.0
    ) -> AsyncIterator[ResumableRequests]:
        for plan in self.plans:
            fake = Fake(dict(plan))
            fake.server = grpc.aio.server()
            add_TrunkServicer_to_server(fake, fake.server)
            self.addresses.append(f"127.0.0.1:{fake.server.add_insecure_port('127.0.0.1:0')}")
            await fake.server.start()
            self.fakes.append(fake)
        self.replicas = Replicas(self, self.known, dead_after=dead_after)
        trunks = ResumableRequests(self.replicas, vocabulary=VOCABULARY, patience=patience)
        try:
            yield trunks
        finally:
            await trunks.close()
            for fake in self.fakes:
                await fake.stop()


async def heard(trunks: ResumableRequests, params: SamplingParams = PARAMS, **options: Any) -> list[Delta]:
    deltas: asyncio.Queue[Delta] = asyncio.Queue()
    await trunks.submit("one", PROMPT, params, deltas.put_nowait, **options)
    found = [await deltas.get()]
    while found[-1].finish_reason is None and found[-1].error is None:
        found.append(await deltas.get())
    await asyncio.sleep(0.01)
    assert deltas.empty()
    return found


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))
