"""Runs an engine in its own thread, for callers in other threads."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from tokenizers import Tokenizer

from engine.delta import Delta, Listener
from engine.engine import Engine, NewTokens
from engine.params import SamplingParams
from engine.sequence import Sequence
from engine.text import Detokenizer, TextStream
from errors import ConfigError, QueueFull, ResourceError, described

_T = TypeVar("_T")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _GenerationRequest:
    """A request under way.

    Attributes:
        reported: Number of new tokens that the listener has received.
    """

    sequence: Sequence
    text: TextStream
    listener: Listener
    reported: int = 0


class EngineService:
    """Runs an engine until `close`.

    What fails for one request (its decoding, its sampling, its listener) ends that request with an error, and
    no other. A step that fails ends all requests.

    Args:
        engine: The engine, used by the service's thread alone from now on.
        tokenizer: Decodes tokens.
        version: Version of the weights.
        abandon: Called after a step has failed, to drop the calls to experts that are under way.

    Attributes:
        taken: Number of requests taken so far.
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
        self._detokenizer = Detokenizer(tokenizer)
        self._abandon = abandon
        self._requests: dict[str, _GenerationRequest] = {}
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
        """Take a request.

        Args:
            id: Name of the request.
            prompt: Tokens of the prompt.
            params: How tokens are chosen and when the request ends.
            listener: Called in the engine's thread with every delta.
            output: Tokens that another engine has generated and reported; deltas begin after them.
            limit: Number of waiting requests at which the request is refused; None never refuses.

        Returns:
            Resolved when the engine has taken the request; ConfigError, DataError or QueueFull when it is
            refused.
        """

        def add() -> None:
            waiting = len(self._engine.scheduler.waiting)
            if limit is not None and waiting >= limit:
                raise QueueFull(f"{waiting} requests are waiting already; come back later")
            text = TextStream(self._detokenizer, params.stop, min_tokens=params.min_tokens)
            for token in output:
                text.feed(token)
            if text.stopped:
                raise ConfigError("output has a stop string; there is nothing to go on with")
            sequence = self._engine.add(id, prompt, params, output)
            self._requests[id] = _GenerationRequest(sequence, text, listener)
            self.taken += 1

        return self.call(add)

    def cancel(self, id: str) -> Future[None]:
        """Drop a request; its listener is not called any more."""

        def drop() -> None:
            self._requests.pop(id, None)
            self._engine.cancel(id)

        return self.call(drop)

    def call(self, work: Callable[[], _T]) -> Future[_T]:
        """Call a function in the engine's thread, between two steps."""
        done: Future[_T] = Future()

        def command() -> None:
            if not done.set_running_or_notify_cancel():  # cancelled by the caller
                return
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            if self._closed:
                raise ResourceError("the engine is closed; it takes no more requests")
            self._commands.append(command)
            self._changed.notify()
        return done

    def exchange(self, change: Callable[[], None], version: str) -> Future[None]:
        """Replace the engine's weights by calling `change` between two steps; later deltas have `version`."""

        def exchange() -> None:
            change()
            self._version = version

        return self.call(exchange)

    @property
    def version(self) -> str:
        """Version of the weights in use."""
        return self._version

    @property
    def load(self) -> tuple[int, int]:
        """Number of running and of waiting requests."""
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
                progress = self._engine.step()
            except Exception as error:
                self._fail(described(error))
                self._abandon_calls()
                continue
            for new in progress:
                self._report(new)

    def _abandon_calls(self) -> None:
        try:
            if self._abandon is not None:
                self._abandon()
        except Exception:  # the next step opens what it needs
            log.exception("the calls to experts could not be dropped")

    def _report(self, new: NewTokens) -> None:
        """Report a step's tokens to the request's listener, or what failed for this request."""
        request = self._requests.get(new.sequence.id)
        if request is None:
            return
        try:
            delta = Delta(error=new.error, own=True) if new.error else self._delta(request, new.tokens)
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            delta = Delta(error=described(error), own=True)
        if delta is None:
            return
        if delta.finish_reason or delta.error:
            self._drop(new.sequence.id, delta.finish_reason or "error")
        try:
            request.listener(delta)
        except BaseException as error:
            log.exception("request %s: its listener failed", new.sequence.id)
            self._drop(new.sequence.id, "error")
            _tell(request, Delta(error=described(error), own=True))

    def _drop(self, id: str, reason: str) -> None:
        """Forget a request; the engine ends it if it has not yet."""
        self._requests.pop(id, None)
        self._engine.finish(id, reason)

    def _delta(self, request: _GenerationRequest, tokens: list[int]) -> Delta | None:
        """The new tokens and text of a request up to the end of its text; None if there is nothing new."""
        sequence = request.sequence
        reason = sequence.finish_reason
        new: list[int] = []
        text = ""
        for token in tokens:
            new.append(token)
            if token in sequence.ends and reason == "stop" and len(new) == len(tokens):
                break  # it ends the text and has no text itself
            text += request.text.feed(token)
            if request.text.stopped:
                reason = "stop"
                break
        if reason is not None:
            text += request.text.finish()
            reason = "stop" if request.text.stopped else reason
        if not new and reason is None:
            return None
        first = request.reported == 0
        logprobs = sequence.logprobs[request.reported : request.reported + len(new)]
        request.reported += len(new)
        return Delta(
            text=text,
            tokens=new,
            logprobs=logprobs,
            prompt_logprobs=sequence.prompt_logprobs if first else [],
            finish_reason=reason,
            cached=sequence.cached,
            version=self._version,
        )

    def _fail(self, text: str) -> None:
        """End all requests with an error."""
        requests, self._requests = self._requests, {}
        for id, request in requests.items():
            self._engine.cancel(id)
            _tell(request, Delta(error=text))


def _tell(request: _GenerationRequest, delta: Delta) -> None:
    """Report an error to a listener, which may be gone."""
    with suppress(BaseException):
        request.listener(delta)


__all__ = ["EngineService"]
