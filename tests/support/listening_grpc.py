"""The interface's gRPC server over a pretended model, in an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

from jobs.api.admission import Admission
from jobs.api.api_keys import ApiKeys
from jobs.serving.interface.grpc_server import InterfaceServer
from protos.generation_pb2 import GenerateReply, GenerateRequest

TEXT = "0 1 2 "
"""The answer to a request for three tokens."""


class FakeBackend:
    """What the server uses of a backend; generation is replaced by `replies`."""

    def __init__(self, *keys: str) -> None:
        self.keys, self.admission = ApiKeys(keys), Admission()
        self.running = 0
        self.largest = 0  # characters of a prompt

    async def health(self) -> str | None:
        return None

    async def replies(self, message: GenerateRequest) -> AsyncGenerator[GenerateReply, None]:
        """A reply for each token that is asked for; with none, replies without end."""
        self.running += 1
        self.largest = max(self.largest, len(message.text))
        try:
            for index in range(message.max_tokens or 1 << 30):
                yield GenerateReply(text=f"{index} ")
                await asyncio.sleep(0.001)
        finally:
            self.running -= 1


class Listening:
    """The server in an event loop of its own."""

    def __init__(self, backend: Any, address: str = "127.0.0.1:0") -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = self.run(self._started(backend, address))
        self.target = f"127.0.0.1:{self.server.port}"

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    async def _started(self, backend: Any, address: str) -> InterfaceServer:
        server = InterfaceServer(backend, address)
        await server.start()
        return server

    def close(self) -> None:
        self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(60)
        self.loop.close()


__all__ = ["TEXT", "FakeBackend", "Listening"]
