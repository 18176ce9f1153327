"""Requests that outlive the replica that generates for them: when it dies, another replica continues them.

A request is defined by its prompt and the tokens generated so far. Each token is a function of these, of the
weights and of one random number, so any replica continues as the first one would have (`engine.sampling`).
Tokens that the client has received are not sent again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from engine.delta import Delta, Listener
from engine.params import SamplingParams, check_tokens
from errors import ChannelError, ConfigError, QueueFull, RequestFailed, ResourceError, described
from jobs.serving.interface.replica_connection import ReplicaConnection
from jobs.serving.interface.replica_leases import ReplicaLease
from jobs.serving.interface.replicas import Replicas
from jobs.serving.trunk_messages import delta_of, sampling_message
from protos.trunk_pb2 import Sampling, TrunkRequest

_LOSSES = 5  # replicas lost in a row without a token from any: the request itself may crash them

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class ResumableRequest:
    """One request, with what a replica needs to continue it.

    Attributes:
        taken: Done when a replica has accepted the request, or refused it.
        output: Tokens generated so far.
        cached: Positions of the prompt that the first replica found in its cache.
        losses: Replicas lost in a row without a token.
    """

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


class ResumableRequests:
    """Generates on the replicas of the trunk, as one service; used in one event loop.

    Args:
        replicas: The replicas, and the choice of one for a request.
        vocabulary: Number of tokens in the vocabulary.
        patience: Seconds that a request waits for a replica.

    Attributes:
        resumed: Number of times that a request was continued after the loss of a replica.
    """

    def __init__(self, replicas: Replicas, *, vocabulary: int, patience: float) -> None:
        self._replicas = replicas
        self._vocabulary, self._patience = vocabulary, patience
        self._leading: dict[str, asyncio.Task[None]] = {}
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
        """Start a request; `listener` is called in this event loop with every delta.

        Returns:
            Done when a replica has accepted the request; with ConfigError or QueueFull if none does.
        """
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            check_tokens(self._vocabulary, prompt, params, ())
        except ConfigError as error:
            taken.set_exception(error)
            return taken
        if params.seed is None and not params.greedy:  # every replica of the request needs the same one
            params = replace(params, seed=secrets.randbits(63))
        request = ResumableRequest(id, prompt, sampling_message(params), listener, limit, taken)
        task = self._leading[id] = asyncio.create_task(self._lead(request))
        task.add_done_callback(lambda _: self._leading.pop(id, None))
        return taken

    def cancel(self, id: str) -> None:
        """End a request; its listener is not called again."""
        task = self._leading.pop(id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """End all requests and close the connections to the replicas."""
        for id in list(self._leading):
            self.cancel(id)
        await self._replicas.close()

    async def _lead(self, request: ResumableRequest) -> None:
        """Run a request to its end, and tell its listener of an error."""
        try:
            await self._to_its_end(request)
        except (ConfigError, QueueFull) as error:
            if not request.taken.done():
                request.taken.set_exception(error)
            elif not request.taken.cancelled():
                request.listener(Delta(error=str(error)))
        except Exception as error:
            if not request.taken.done():
                request.taken.set_result(None)
            request.listener(Delta(error=described(error), own=isinstance(error, RequestFailed)))

    async def _to_its_end(self, request: ResumableRequest) -> None:
        """Generate on one replica after the other until the request has ended.

        Raises:
            ConfigError, QueueFull: A replica refuses the request.
            ResourceError: No replica could complete it.
        """
        attempt, why = 0, "no replica has started yet"
        while not request.ended:
            attempt += 1
            name = f"{request.id}-{attempt}"
            try:
                async with asyncio.timeout(self._patience):
                    lease = await self._replicas.take()
            except TimeoutError:
                raise ResourceError(
                    f"no replica of the trunk within {self._patience:g} s (serving.resume_timeout); {why}"
                ) from None
            connection = self._replicas.connection(lease.address)
            try:
                await self._follow(connection, lease, name, request)
            except ChannelError as error:
                why = str(error)
                self._replicas.lost(lease, connection)
                request.losses += 1
                self.resumed += 1
                log.warning("request %s lost its replica after %d tokens: %s", name, len(request.output), why)
                if request.losses > _LOSSES:
                    raise ResourceError(
                        f"{request.losses} replicas of the trunk were lost in a row without a token; {why}"
                    ) from None
            except BaseException:
                self._replicas.give_back(lease)
                raise
            else:
                self._replicas.give_back(lease)

    async def _follow(
        self, connection: ReplicaConnection, lease: ReplicaLease, name: str, request: ResumableRequest
    ) -> None:
        """Pass the deltas of one replica on to the listener.

        Raises:
            ChannelError: The replica is lost.
            ConfigError, QueueFull: The replica refuses the request.
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
        async with aclosing(connection.generate(message)) as replies:
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


__all__ = ["ResumableRequest", "ResumableRequests"]
