"""An engine that runs in a thread of its own, for callers in other threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from tokenizers import Tokenizer

from engine.engine import Engine
from engine.params import SamplingParams
from engine.sequence import Sequence, TokenLogprobs
from engine.text import TextStream
from errors import ConfigError, QueueFull, RaymoeError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new about a request.

    Attributes:
        text: that is certain now.
        tokens: generated; the one that ended the text is among them.
        logprobs: of these tokens, when asked for.
        prompt_logprobs: of the prompt, with the first delta after it was read.
        finish_reason: `stop`, `length` or `abort` in the last delta.
        error: why there will be no more, in place of a finish_reason.
        cached: positions of the prompt that were found in the cache.
        version: of the weights that computed the tokens.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cached: int = 0
    version: str = ""


Listener = Callable[[Delta], None]


@dataclass(slots=True)
class _Request:
    sequence: Sequence
    text: TextStream
    listener: Listener
    told: int = 0


class EngineService:
    """Runs an engine until `close`.

    Args:
        engine: used by this thread alone from now on.
        tokenizer: makes text.
        version: of the weights.
        abandon: called after a step has failed, before the next one: drops what is under way.

    Attributes:
        taken: requests so far.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        version: str = "",
        abandon: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._version = version
        self._tokenizer = tokenizer
        self._abandon = abandon
        self._requests: dict[str, _Request] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.taken = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        id: str,
        prompt: Items[int],
        params: SamplingParams,
        listener: Listener,
        *,
        output: Items[int] = (),
        limit: int | None = None,
    ) -> Future[None]:
        """Take a request; `listener` is called in the engine's thread with every delta.

        Args:
            output: tokens that were generated and told elsewhere; the deltas are of what comes after them.
            limit: requests that may wait already.

        Returns:
            Done when the engine has it, with a ConfigError if it will not, or with QueueFull.
        """

        def add() -> None:
            waiting = len(self._engine.scheduler.waiting)
            if limit is not None and waiting >= limit:
                raise QueueFull(f"{waiting} requests are waiting already; come back later")
            text = TextStream(self._tokenizer, params.stop, min_tokens=params.min_tokens)
            for token in output:
                text.feed(token)
            if text.stopped:
                raise ConfigError("output has a stop string; there is nothing to go on with")
            sequence = self._engine.add(id, prompt, params, output)
            self._requests[id] = _Request(sequence, text, listener)
            self.taken += 1

        return self.call(add)

    def cancel(self, id: str) -> Future[None]:
        """Drop a request; its listener hears no more."""

        def drop() -> None:
            self._requests.pop(id, None)
            self._engine.cancel(id)

        return self.call(drop)

    def call(self, work: Callable[[], _T]) -> Future[_T]:
        """Let the engine's thread do something between two steps."""
        done: Future[_T] = Future()

        def command() -> None:
            if not done.set_running_or_notify_cancel():  # whoever wanted it has gone
                return
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            if self._closed:
                raise RaymoeError("the engine is closed; it takes no more requests")
            self._commands.append(command)
            self._changed.notify()
        return done

    def exchange(self, change: Callable[[], None], version: str) -> Future[None]:
        """Let `change` give the engine other weights between two steps; what comes after it is theirs."""

        def exchange() -> None:
            change()
            self._version = version

        return self.call(exchange)

    @property
    def version(self) -> str:
        """Of the weights in use."""
        return self._version

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        scheduler = self._engine.scheduler
        return len(scheduler.running), len(scheduler.waiting)

    def close(self) -> None:
        """End the thread; requests under way end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._commands or self._engine.has_work or self._closed)
                closed = self._closed
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command()
            if closed:
                self._fail("the server is shutting down")
                return
            try:
                for progress in self._engine.step():
                    request = self._requests.get(progress.sequence.id)
                    if request is not None:
                        self._tell(request, progress.tokens)
            except Exception as error:
                ours = isinstance(error, RaymoeError)
                self._fail(str(error) if ours else f"{type(error).__name__}: {error}")
                if self._abandon is not None:
                    self._abandon()

    def _tell(self, request: _Request, tokens: list[int]) -> None:
        """Let a request's listener know of its new tokens, as far as its text goes."""
        sequence = request.sequence
        reason = sequence.finish_reason
        new: list[int] = []
        text = ""
        for token in tokens:
            new.append(token)
            if token in sequence.ends and reason == "stop" and len(new) == len(tokens):
                break  # it ends the text and is no part of it
            text += request.text.feed(token)
            if request.text.stopped:
                reason = "stop"
                self._engine.finish(sequence.id, reason)
                break
        if reason is not None:
            text += request.text.finish()
            self._requests.pop(sequence.id, None)
        if not new and reason is None:
            return
        first = request.told == 0
        logprobs = sequence.logprobs[request.told : request.told + len(new)]
        request.told += len(new)
        request.listener(
            Delta(
                text=text,
                tokens=new,
                logprobs=logprobs,
                prompt_logprobs=sequence.prompt_logprobs if first else [],
                finish_reason=reason,
                cached=sequence.cached,
                version=self._version,
            )
        )

    def _fail(self, text: str) -> None:
        """End all requests with an error."""
        requests, self._requests = self._requests, {}
        for id, request in requests.items():
            self._engine.cancel(id)
            request.listener(Delta(error=text))


__all__ = ["Delta", "EngineService", "Listener"]
