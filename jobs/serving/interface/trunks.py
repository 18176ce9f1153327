"""Requests on replicas of the trunk: when a replica dies, another one goes on with them.

A request is known by its prompt and by the tokens that it has got. Each token is a function of these, of the
weights and of one random number, so that any replica goes on as the first one would have (`engine.sampling`),
and what was told is not told again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.params import SamplingParams, check_tokens
from engine.service import Delta, Listener
from errors import ChannelError, ConfigError, QueueFull, RaymoeError, ResourceError
from jobs.serving.interface.trunk_link import TrunkLink
from jobs.serving.trunk_messages import delta_of, sampling_message
from protos.trunk_pb2 import Sampling, TrunkRequest, TrunkStatus

_LOSSES = 5  # of replicas in a row, without a token from any: it may be the request that they die of
_IDLE_SECONDS = 60.0
_RETRY_SECONDS = 0.1
_SUSPECT_SECONDS = 1.0
_SERVE_SECONDS = 1.0  # that Serve has to name a replica before replicas are asked themselves
_SERVE_SUSPECT_SECONDS = 0.25  # the same, while some replica has given no answer
_POOL_SECONDS = 0.3
_ANSWER_SECONDS = 0.1  # within which answers are compared by load

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lease:
    """A replica for one request at a time.

    Attributes:
        name: of the lease, for the replica.
        address: of the replica's gRPC service.
        began: when it was given, of the clock of whoever gave it.
        call: Serve's call, to be kept as long as the lease is used; None where Serve does not count it.
    """

    name: str
    address: str
    began: float
    call: object = None


class Routes(Protocol):
    """Knows replicas."""

    async def take(self) -> Lease:
        """A replica for a request, as soon as there is one."""
        ...

    def give_back(self, lease: Lease) -> None:
        """A request has ended."""
        ...

    def lost(self, lease: Lease) -> None:
        """A request has not, for its replica is gone or hangs."""
        ...


@dataclass(slots=True, eq=False)
class _Request:
    id: str
    prompt: Sequence[int]
    sampling: Sampling
    listener: Listener
    limit: int | None
    taken: asyncio.Future[None]
    output: list[int] = field(default_factory=list)
    cached: int = 0
    losses: int = 0
    ended: bool = False


class Trunks:
    """The replicas, as one that generates; in one event loop.

    Args:
        routes: say which replica takes a request.
        replicas: addresses of all replicas by name, as the pool of the deployment knows them.
        vocabulary: tokens that there are.
        patience: seconds that a request waits for a replica.
        dead_after: seconds without an answer after which a replica counts as dead.
    """

    def __init__(
        self,
        routes: Routes,
        replicas: Callable[[], Awaitable[Mapping[str, str]]],
        *,
        vocabulary: int,
        patience: float,
        dead_after: float,
    ) -> None:
        self._routes, self._replicas = routes, replicas
        self._vocabulary = vocabulary
        self._patience, self._dead_after = patience, dead_after
        self._links: dict[str, TrunkLink] = {}
        self._suspects: set[str] = set()
        self._leading: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.resumed = 0

    def submit(
        self,
        id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        *,
        limit: int | None = None,
    ) -> asyncio.Future[None]:
        """See `jobs.api.backend.Service`; `listener` is called in this event loop."""
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            check_tokens(self._vocabulary, prompt, params, ())
        except ConfigError as error:
            taken.set_exception(error)
            return taken
        if (
            params.seed is None and not params.greedy
        ):  # one that goes with the request from replica to replica
            params = replace(params, seed=secrets.randbits(63))
        request = _Request(id, prompt, sampling_message(params), listener, limit, taken)
        task = self._leading[id] = asyncio.create_task(self._lead(request))
        task.add_done_callback(lambda _: self._leading.pop(id, None))
        return taken

    def cancel(self, id: str) -> None:
        """Drop a request; its listener hears no more."""
        task = self._leading.pop(id, None)
        if task is not None:
            task.cancel()

    async def status(self, address: str, *, health: bool = False) -> TrunkStatus:
        """How a replica stands.

        Raises:
            ChannelError: it does not say.
        """
        return await self._link(address).status(health=health)

    async def close(self) -> None:
        """Drop all requests, and hang up."""
        for id in list(self._leading):
            self.cancel(id)
        await asyncio.gather(*(link.close() for link in self._links.values()))

    async def _lead(self, request: _Request) -> None:
        """See a request to its end."""
        try:
            await self._to_its_end(request)
        except (ConfigError, QueueFull) as error:
            if not request.taken.done():
                request.taken.set_exception(error)
            elif not request.taken.cancelled():
                request.listener(Delta(error=str(error)))
        except Exception as error:
            text = str(error) if isinstance(error, RaymoeError) else f"{type(error).__name__}: {error}"
            if not request.taken.done():
                request.taken.set_result(None)
            request.listener(Delta(error=text))

    async def _to_its_end(self, request: _Request) -> None:
        """Raises:
        ConfigError, QueueFull: it is not taken.
        ResourceError: no replica could see it to its end.
        """
        attempt, why = 0, "none has been there yet"
        while not request.ended:
            attempt += 1
            name = f"{request.id}-{attempt}"
            try:
                async with asyncio.timeout(self._patience):
                    lease = await self._route()
            except TimeoutError:
                raise ResourceError(
                    f"no replica of the trunk within {self._patience:g} s (serving.resume_timeout); {why}"
                ) from None
            link = self._link(lease.address)
            try:
                await self._follow(link, lease, name, request)
            except ChannelError as error:
                why = str(error)
                self._routes.lost(lease)
                self._gone(link)
                request.losses += 1
                self.resumed += 1
                log.warning("request %s lost its replica after %d tokens: %s", name, len(request.output), why)
                if request.losses > _LOSSES:
                    raise ResourceError(
                        f"{request.losses} replicas of the trunk were lost in a row without a token; {why}"
                    ) from None
            except BaseException:
                self._routes.give_back(lease)
                raise
            else:
                self._routes.give_back(lease)

    async def _route(self) -> Lease:
        """The replica that Serve names, or one that answers a call of ours where Serve names none that does.

        Serve compares queue lengths that it counts itself. A replica that hangs has lost its requests, so
        its queue is the shortest of all, and Serve may name it again and again.
        """
        named = asyncio.create_task(self._named())
        try:
            while True:
                patience = _SERVE_SUSPECT_SECONDS if self._suspects else _SERVE_SECONDS
                done, _ = await asyncio.wait({named}, timeout=patience)
                if done:
                    return named.result()
                address = await self._answering()
                if address is not None and not named.done():
                    name = secrets.token_hex(16)
                    return Lease(name=name, address=address, began=time.monotonic())
        finally:
            named.cancel()

    async def _named(self) -> Lease:
        """A replica that Serve names and that is not known to hang."""
        while True:
            lease = await self._routes.take()
            if lease.address not in self._suspects:
                return lease
            try:
                await self._link(lease.address).status(timeout=_SUSPECT_SECONDS)
            except ChannelError:
                self._routes.lost(lease)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._suspects.discard(lease.address)
                return lease

    async def _answering(self) -> str | None:
        """Address of the least loaded replica of those that answer; None where none does within a second."""
        known = set(self._links)
        with suppress(Exception):  # of a pool that is away: those that have been used are known
            async with asyncio.timeout(_POOL_SECONDS):
                known.update((await self._replicas()).values())
        asking = {
            asyncio.create_task(self._link(address).status(timeout=_SUSPECT_SECONDS)): address
            for address in known
        }
        if not asking:
            return None
        try:
            done, pending = await asyncio.wait(asking, timeout=_ANSWER_SECONDS)
            while pending and not any(one.exception() is None for one in done):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            loads = {
                asking[one]: one.result().running + one.result().waiting
                for one in done
                if one.exception() is None
            }
        finally:
            for one in asking:
                one.cancel()
        self._suspects.difference_update(loads)
        return min(loads, key=loads.__getitem__, default=None)

    async def _follow(self, link: TrunkLink, lease: Lease, name: str, request: _Request) -> None:
        """Tell what comes from one replica.

        Raises:
            ChannelError: the replica is lost.
            ConfigError, QueueFull: it does not take the request.
        """
        taken = request.taken
        limit = None if taken.done() else request.limit
        message = TrunkRequest(
            id=name,
            prompt=request.prompt,
            output=request.output,
            sampling=request.sampling,
            limit=limit,
            lease=lease.name,
        )
        resumed = bool(request.output)
        async with aclosing(link.generate(message)) as replies:
            async for reply in replies:
                if not taken.done():
                    taken.set_result(None)
                if not (reply.tokens or reply.finish_reason or reply.error):
                    continue
                delta = delta_of(reply)
                if resumed:
                    delta = replace(delta, cached=request.cached)
                request.cached = delta.cached
                request.output += delta.tokens
                request.losses = 0
                request.ended = delta.finish_reason is not None or delta.error is not None
                request.listener(delta)
                if request.ended:
                    return

    def _link(self, address: str) -> TrunkLink:
        link = self._links.get(address)
        if link is None or link.lost is not None:
            for old in list(self._links.values()):
                if old.idle and (old.lost or time.monotonic() - old.used > _IDLE_SECONDS):
                    self._drop(old)
            link = self._links[address] = TrunkLink(address, dead_after=self._dead_after)
        return link

    def _gone(self, link: TrunkLink) -> None:
        self._suspects.add(link.address)
        if link.idle:
            self._drop(link)

    def _drop(self, link: TrunkLink) -> None:
        if self._links.get(link.address) is link:
            del self._links[link.address]
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


__all__ = ["Lease", "Routes", "Trunks"]
