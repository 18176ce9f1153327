"""The interface of a served model as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.process_heap import freeze_heap
from jobs.api import build_api
from jobs.api.backend import Backend
from jobs.api.serving_metrics import ServingMetrics
from jobs.chat.chat_renderer import ChatRenderer
from jobs.chat.chat_template import ChatTemplate
from jobs.checkpoints.generation_defaults import GenerationDefaults
from jobs.console import say
from jobs.data.tokenizer import load_tokenizer
from jobs.serving.config import ServeConfig
from jobs.serving.interface.chat_template_exchange import ChatTemplateExchange
from jobs.serving.interface.deployment_status import DeploymentStatus
from jobs.serving.interface.grpc_server import InterfaceServer
from jobs.serving.interface.replica_leases import ServeLeases
from jobs.serving.interface.replicas import Replicas
from jobs.serving.interface.resumable_requests import ResumableRequests
from jobs.serving.pool_link import PoolLink
from jobs.serving.pool_notes import PoolNotes
from jobs.serving.version_follower import Exchanger, Follower
from jobs.serving.versions import ReplicaState, WantedVersions, WeightsVersion
from model.checkpoints.hf_config import model_config

_RETRY_SECONDS = 1.0


def _backend() -> Backend:
    """The backend of this process, which handles the current request."""
    interface: Interface = serve.get_replica_context().servable_object
    return interface.backend


async def _told_by(front: DeploymentHandle) -> tuple[str | None, str | None]:
    """The token of requests for metrics that need no key, and the address at which the front expects gRPC."""
    return await front.token.remote(), await front.grpc_backend.remote()


def _tell_of_keys(pool: DeploymentHandle, front: DeploymentHandle | None) -> Callable[[str], None]:
    """What is given a line about API keys: the log, and the pool unless a front follows the same file."""
    return say if front is not None else partial(PoolNotes(pool).tell, "keys")


@serve.ingress(build_api(_backend))
class Interface:
    """One process of the interface; it has no weights.

    Args:
        values: A `ServeConfig` as plain values.
        directory: The directory with the tokenizer, which is the same for all versions of the weights.
        title: Name of the model for clients.
        pool: Handle of the pool's deployment.
        trunk: Handle of the trunk replicas' deployment.
        front: Handle of the front's deployment; None without a front.
        grpc: Host and port for gRPC without a front; None is without.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        values: dict[str, Any],
        directory: str,
        title: str,
        pool: DeploymentHandle,
        trunk: DeploymentHandle,
        *,
        front: DeploymentHandle | None,
        grpc: str | None,
    ) -> None:
        self._closing = ExitStack()  # closed in the reverse order
        self._server: InterfaceServer | None = None
        config = ServeConfig.from_dict(values)
        keys = config.serving.allowed_keys(_tell_of_keys(pool, front))
        model = model_config(Path(directory))
        text = load_tokenizer(Path(directory), model.vocab_size)
        self._link = PoolLink(pool, serve.get_replica_context().replica_tag, interface=True)
        self._closing.callback(self._link.close)
        member = await self._link.enter()
        await self._link.report(ReplicaState(uses=member.version.epoch))
        weights = Path(member.version.directory)
        chat = ChatRenderer(ChatTemplate.from_directory(weights), waiting=config.serving.max_queue)
        self._closing.callback(chat.close)
        await chat.start()
        replicas = Replicas(ServeLeases(trunk), self._link.trunks, dead_after=config.cluster.dead_after)
        requests = ResumableRequests(
            replicas, vocabulary=text.vocabulary, patience=config.serving.resume_timeout
        )
        source = config.serving.generation_config
        token, grpc = (None, grpc) if front is None else await _told_by(front)
        deployment = DeploymentStatus(replicas, self._link.trunks, self._link.experts)
        self._backend = Backend(
            model=title,
            version=lambda: self._templates.version,
            service=requests,
            tokenizer=text.tokenizer,
            chat=chat,
            longest=config.serving.engine_settings().longest(model.max_position_embeddings),
            end_of_text=text.end_of_text,
            limits=config.serving.limits(),
            keys=keys,
            health=deployment.health,
            engines=deployment.engines,
            experts=deployment.experts,
            metrics=ServingMetrics(title),
            front_token=token,
            defaults=GenerationDefaults.of(weights, source),
        )
        self._closing.callback(self._backend.close)
        self._templates = ChatTemplateExchange(self._backend, member.version.name, source)
        self._closing.callback(self._templates.close)
        if grpc is not None:
            self._server = InterfaceServer(self._backend, grpc)
            await self._server.start()
        self._link.serves = True  # the first report of the follower says so
        self._following = asyncio.create_task(self._follow(member.run, member.version))
        self._closing.callback(self._following.cancel)
        freeze_heap()

    @property
    def backend(self) -> Backend:
        """The served model."""
        return self._backend

    async def __del__(self) -> None:  # Serve awaits it, when the requests that it counts have ended
        if self._server is not None:
            self._backend.admission.close()
            await self._backend.admission.drained()
            await self._server.stop()
        self._closing.close()

    async def _ask(self, known: int) -> WantedVersions:
        """The versions that the pool wants; refuses requests once the deployment shuts down."""
        wanted = await self._link.ask(known)
        admission = self._backend.admission
        if wanted.closing and not admission.closed:
            admission.close()
            self._draining = asyncio.create_task(self._drain())
        return wanted

    async def _drain(self) -> None:
        """Tell the pool when no request is in progress any more."""
        await self._backend.admission.drained()
        if self._server is not None:
            await self._server.stop()
        while True:
            try:
                await self._link.drained()
            except Exception:  # the pool is restarting; without this report the shutdown waits its full grace
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return

    async def _follow(self, run: str, version: WeightsVersion) -> None:
        """Follow the version that the pool wants; after a crash of the pool, join the new one."""
        templates: asyncio.Future[Exchanger] = asyncio.get_running_loop().create_future()
        templates.set_result(self._templates)
        while True:
            follower = Follower(run, version, ask=self._ask, report=self._link.report)
            await follower.follow(templates)
            while True:
                try:
                    member = await self._link.enter()
                    exchanger = await templates
                    await exchanger.prepare(member.version)
                    await exchanger.exchange(member.version)
                except Exception:  # the pool is restarting
                    await asyncio.sleep(_RETRY_SECONDS)
                else:
                    break
            run, version = member.run, member.version


__all__ = ["Interface"]
