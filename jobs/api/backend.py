"""A served model as the interface sees it: generation service, tokenizer and limits."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer

from engine.delta import Delta, Listener
from engine.params import SamplingParams
from engine.text import Detokenizer
from jobs.api.admission import Admission
from jobs.api.api_errors import ApiError, accepted, all_accepted, invalid, refusals, too_long
from jobs.api.api_keys import ApiKeys
from jobs.api.parsing_memory.body_memory import BodyMemory
from jobs.api.request_bodies import ChatRequest, CompletionRequest
from jobs.api.serving_metrics import EngineFigures, ExpertFigures, ServingMetrics
from jobs.api.text_encoder import TextEncoder
from jobs.chat.chat_renderer import ChatRenderer
from jobs.checkpoints.generation_defaults import GenerationDefaults
from jobs.data.tokenizer import opening_length

_Request = TypeVar("_Request", ChatRequest, CompletionRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on requests.

    Attributes:
        max_queue: Requests that may wait at a replica; further ones get status 429.
        max_prompt: Tokens of a prompt; None is the model's limit.
        max_tokens: Tokens that a request may ask for; None is the model's limit.
        body_memory: Bytes that request bodies may take at a time while they arrive, and again when parsed.
        body_rate: Bytes per second that a client has to send of a body.
    """

    max_queue: int = 256
    max_prompt: int | None = None
    max_tokens: int | None = None
    body_memory: int = 256 << 20
    body_rate: int = 64 << 10


class Service(Protocol):
    """Generates tokens: an engine in this process, or trunk replicas in others."""

    def submit(
        self,
        id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        *,
        limit: int | None = None,
    ) -> Future[None] | asyncio.Future[None]:
        """Start a request; `listener` is called with every delta, in any thread.

        Args:
            limit: Requests that may be waiting already; with more, the request is refused.

        Returns:
            Done when the request is accepted; fails with ConfigError or QueueFull if it is refused.
        """
        ...

    def cancel(self, id: str) -> object:
        """End a request; its listener is not called again."""
        ...


async def _no_engines() -> Mapping[str, EngineFigures]:
    return {}


async def _no_experts() -> ExpertFigures | None:
    return None


@dataclass(slots=True, kw_only=True)
class Backend:
    """The served model in one process of the interface.

    Attributes:
        model: Name of the model.
        chat: Renders conversations; exchanged with the weights.
        version: Returns the version of the weights in use; answers carry the version that computed them.
        longest: Tokens that prompt and answer may have together.
        end_of_text: Token that an empty prompt stands for.
        defaults: Sampling parameters that a request does not set.
        keys: API keys that requests may carry.
        opening: Number of tokens that the tokenizer puts before a text (BOS).
        health: Returns why requests cannot be answered, or None.
        engines: Returns the engines' figures by name.
        experts: Returns the expert hosts' figures; None if there are no hosts.
        admission: Admits requests until the server shuts down.
        front_token: What the front sends with requests for metrics that need no key; None without a front.
        arriving: Memory for request bodies that are read.
        bodies: Memory for request bodies that are parsed.
        detokenizer: Decodes tokens.
    """

    model: str
    version: Callable[[], str]
    service: Service
    tokenizer: Tokenizer
    chat: ChatRenderer
    longest: int
    end_of_text: int
    limits: Limits
    health: Callable[[], Awaitable[str | None]]
    engines: Callable[[], Awaitable[Mapping[str, EngineFigures]]] = _no_engines
    experts: Callable[[], Awaitable[ExpertFigures | None]] = _no_experts
    metrics: ServingMetrics
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    keys: ApiKeys = field(default_factory=ApiKeys)
    admission: Admission = field(default_factory=Admission)
    front_token: str | None = field(default=None, repr=False)
    arriving: BodyMemory = field(init=False, repr=False)
    bodies: BodyMemory = field(init=False, repr=False)
    created: int = field(default_factory=lambda: int(time.time()))
    detokenizer: Detokenizer = field(init=False, repr=False)
    opening: int = field(init=False, repr=False)
    _longest_token: int = field(init=False, repr=False)
    _encoder: TextEncoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.arriving = BodyMemory(self.limits.body_memory)
        self.bodies = BodyMemory(self.limits.body_memory)
        self.detokenizer = Detokenizer(self.tokenizer)
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))
        self.opening = opening_length(self.tokenizer)
        self._encoder = TextEncoder(self.tokenizer, waiting=self.limits.max_queue)

    def close(self) -> None:
        """End the processes that tokenize, if there are any."""
        self._encoder.close()

    def check_key(self, authorization: str | None) -> None:
        """Check the API key of a request.

        Args:
            authorization: `Bearer KEY`, from an HTTP header or gRPC metadata; the scheme in any case.

        Raises:
            ApiError: A key is needed, and it is missing or wrong.
        """
        if not self.keys.allows(authorization):
            raise ApiError(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    def check_model(self, name: str | None) -> None:
        """Check the model name of a request; None is accepted.

        Raises:
            ApiError: It is another model's.
        """
        if name is not None and name != self.model:
            raise ApiError(
                404,
                f"there is no model {name!r}; this is {self.model!r}",
                param="model",
                code="model_not_found",
            )

    def completed(self, request: _Request) -> _Request:
        """A request with the defaults of the model for the sampling parameters that it does not set."""
        values = self.defaults.values
        missing = {name: value for name, value in values.items() if name not in request.model_fields_set}
        return request.model_copy(update=missing)

    async def encode(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        """Tokenize a text; a special token that it spells becomes that token.

        Args:
            text: A prompt, or a conversation as the chat template writes it.
            param: Name of the parameter with the text.
            add_special_tokens: Add those that the tokenizer's post-processor says (BOS); templates write
                them themselves.

        Raises:
            ApiError: It has an unpaired surrogate, or more characters than any prompt can have; or the
                tokenizer cannot encode it, takes too long, or has too many texts before it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid(f"{param} has half of a surrogate pair, which is no character", param) from error
        if len(text) > self.longest * self._longest_token:  # without tokenizing, which would take seconds
            raise too_long(
                f"This model's maximum context length is {self.longest} tokens. However, {param} has "
                f"{len(text)} characters, more than so many tokens have. Please reduce its length.",
                param,
            )
        with refusals(param):
            return await self._encoder.encode(text, add_special_tokens=add_special_tokens)

    async def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt of a conversation, by the chat template.

        Raises:
            ApiError: The template cannot render these messages, or too many conversations wait for it.
        """
        chat = self.chat  # a change of weights can replace it meanwhile
        with refusals("messages"):
            text = await chat.render(messages)
        return await self.encode(text, "messages", add_special_tokens=chat.template.plain)

    def room(self, prompt: Sequence[int], wanted: int | None, param: str, *, source: str = "prompt") -> int:
        """Number of tokens that may be generated after a prompt.

        Args:
            wanted: Number that the request asks for; None takes the model's default, or else as many as
                possible; 0 is none.
            param: Name of the parameter with this number.
            source: Name of the parameter with the prompt.

        Raises:
            ApiError: The prompt is too long, or leaves room for fewer tokens than wanted.
        """
        size, longest, limits = len(prompt), self.longest, self.limits
        model = f"This model's maximum context length is {longest} tokens"
        advice = f"Please reduce the length of the {source}."
        if limits.max_prompt is not None and size > limits.max_prompt:
            raise too_long(
                f"Input tokens exceed the configured limit of {limits.max_prompt} tokens. "
                f"Your {source} resulted in {size} tokens. {advice}",
                source,
            )
        if size + (wanted != 0) > longest:
            left = "" if size > longest else ", which leaves no room for an answer"
            raise too_long(
                f"{model}. However, your {source} resulted in {size} tokens{left}. {advice}", source
            )
        if wanted is not None and size + wanted > longest:
            raise too_long(
                f"{param} is too large: {wanted}. {model} and your {source} resulted in {size} tokens, "
                f"which leaves room for {longest - size}.",
                param,
            )
        most = longest if limits.max_tokens is None else limits.max_tokens
        if wanted is not None and wanted > most:
            raise invalid(f"{param} is {wanted}, and this server generates at most {most} tokens", param)
        room = min(longest - size, most)
        return min(room, self.defaults.max_tokens or room) if wanted is None else wanted

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        choices: int,
        sources: Sequence[str] | None = None,
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Generate several choices; yields all deltas that are ready, each with the index of its choice.

        Closing the generator ends the generation.

        Args:
            prompts: The prompt of each choice.
            params: The sampling parameters of each choice.
            choices: Number of choices of each prompt, which are neighbours.
            sources: The path of each choice's prompt in the request, for errors; None is `messages`.

        Raises:
            ApiError: The queue is full, or the engine refuses the request.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        open_: dict[int, str] = {}
        began = time.perf_counter()
        try:
            taken: list[asyncio.Task[None]] = []
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                open_[index] = f"{index}-{uuid.uuid4().hex}"

                def hear(delta: Delta, index: int = index) -> None:
                    loop.call_soon_threadsafe(deltas.put_nowait, (index, delta))

                # The queue accepts all choices of a request or none: only the first one has a limit.
                limit = None if index else self.limits.max_queue
                submitted = self.service.submit(open_[index], prompt, one, hear, limit=limit)
                source = "messages" if sources is None else sources[index]
                taken.append(asyncio.ensure_future(accepted(submitted, source)))
                if not index:
                    await all_accepted(taken)
            await all_accepted(taken)
            self.metrics.prompt_tokens.inc(sum(map(len, prompts[::choices])))
            timing = self.metrics.timing(began)
            while open_:
                ready = [await deltas.get()]
                while not deltas.empty():
                    ready.append(deltas.get_nowait())
                for index, delta in ready:
                    if delta.finish_reason or delta.error:
                        del open_[index]
                timing.note(ready)
                yield ready
        finally:
            for id in open_.values():
                self.service.cancel(id)


__all__ = ["Backend", "Limits", "Service"]
