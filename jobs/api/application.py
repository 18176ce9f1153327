"""The routes of the OpenAI-compatible interface."""

# No `from __future__ import annotations`: FastAPI could not read the routes' types, which are local here.
import hmac
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from engine.service import Delta
from errors import ConfigError, DataError
from jobs.api.answers import Choice, Envelope, Usage, chat_logprobs, completion_logprobs
from jobs.api.backend import Backend
from jobs.api.problems import (
    ApiError,
    answer_api_error,
    answer_failure,
    answer_http_error,
    answer_validation_error,
    invalid,
)
from jobs.api.schemas import ChatRequest, CompletionRequest

_DONE = "data: [DONE]\n\n"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "A parameter cannot be.",
        401: "No valid API key.",
        404: "No such model.",
        429: "The queue is full; come back after Retry-After seconds.",
        503: "The experts cannot be reached.",
    }.items()
}


def build_api(find: Callable[[], Backend]) -> FastAPI:
    """The interface of the backend that `find` gives when a request comes."""
    api = FastAPI(title="raymoe", description="OpenAI-compatible interface of a served model.")
    api.add_exception_handler(ApiError, answer_api_error)
    api.add_exception_handler(RequestValidationError, answer_validation_error)
    api.add_exception_handler(HTTPException, answer_http_error)
    api.add_exception_handler(Exception, answer_failure)

    def allowed(authorization: Annotated[str | None, Header()] = None) -> Backend:
        backend = find()
        keys = backend.limits.api_keys
        given = (authorization or "").removeprefix("Bearer ").encode()
        if keys and not any(hmac.compare_digest(given, key.encode()) for key in keys):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return backend

    Allowed = Annotated[Backend, Depends(allowed)]

    @api.get("/health")
    def health() -> Response:
        """200 when every expert has a live host, else 503 with the reason."""
        reason = find().health()
        if reason is not None:
            return ApiError(503, reason, retry_after=1).response()
        return JSONResponse({"status": "ok"})

    @api.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        return Response(find().metrics.exposition(), media_type="text/plain; version=0.0.4")

    @api.get("/v1/models", responses=_ERRORS)
    def models(backend: Allowed) -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_card(backend)]}

    @api.get("/v1/models/{name:path}", responses=_ERRORS)
    def model(name: str, backend: Allowed) -> dict[str, Any]:
        """One model."""
        _check_model(backend, name)
        return _card(backend)

    @api.post("/v1/completions", responses=_ERRORS)
    async def completions(request: CompletionRequest, backend: Allowed) -> Response:
        """Go on with a text."""
        _check_model(backend, request.model)
        return await _complete(backend, request)

    @api.post("/v1/chat/completions", responses=_ERRORS)
    async def chat(request: ChatRequest, backend: Allowed) -> Response:
        """Answer in a conversation."""
        _check_model(backend, request.model)
        return await _chat(backend, request)

    return api


def _card(backend: Backend) -> dict[str, Any]:
    return {
        "id": backend.model,
        "object": "model",
        "created": backend.created,
        "owned_by": "raymoe",
        "max_model_len": backend.longest,
        "version": backend.version,
    }


def _check_model(backend: Backend, name: str | None) -> None:
    if name is not None and name != backend.model:
        raise ApiError(
            404,
            f"there is no model {name!r}; this is {backend.model!r}",
            param="model",
            code="model_not_found",
        )


async def _complete(backend: Backend, request: CompletionRequest) -> Response:
    prompts = _prompts(backend, request.prompt)
    params = []
    for prompt in prompts:
        # With echo alone nothing is to be generated, but the engine's steps always do.
        wanted = max(1, request.max_tokens) if request.max_tokens is not None else None
        room = backend.room(prompt, wanted, "max_tokens")
        for index in range(request.n):
            try:
                params.append(
                    request.sampling(
                        max_tokens=room, index=index, logprobs=request.logprobs, echo=request.echo
                    )
                )
            except ConfigError as error:
                raise invalid(str(error), str(error).split()[0]) from error
    repeated = [prompt for prompt in prompts for _ in range(request.n)]
    usage = Usage(prompt=sum(map(len, prompts)))
    envelope = Envelope(kind="text_completion", model=backend.model, version=backend.version, prefix="cmpl")
    deltas = backend.generate(repeated, params)
    choices = [Choice(prompt=prompt) for prompt in repeated]

    def part(index: int, choice: Choice, *, first: bool) -> dict[str, Any]:
        """A choice, or what is new about it."""
        text, tokens = choice.text, choice.tokens
        logprobs: list[Any] = list(choice.logprobs)
        reason = choice.finish_reason
        if request.max_tokens == 0:
            text, tokens, logprobs, reason = "", [], [], reason and "length"
        if request.echo and first:
            text = backend.tokenizer.decode(list(choice.prompt), skip_special_tokens=False) + text
            tokens = [*choice.prompt, *tokens]
            logprobs = [None, *choice.prompt_logprobs, *logprobs]
        shown = None
        if request.logprobs is not None:
            shown = completion_logprobs(backend.tokenizer, tokens, logprobs)
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    if request.stream:
        events = _stream(
            backend,
            deltas,
            choices,
            usage,
            envelope,
            lambda index, news, first: [part(index, news, first=first)],
            include_usage=request.include_usage,
        )
        return await _streaming(events)
    await _gather(deltas, choices, usage)
    if request.max_tokens == 0:
        usage.completion = 0
    return JSONResponse(
        envelope.body([part(index, choice, first=True) for index, choice in enumerate(choices)], usage)
    )


async def _chat(backend: Backend, request: ChatRequest) -> Response:
    try:
        text = backend.chat.render([message.plain() for message in request.messages])
    except DataError as error:
        raise invalid(str(error), "messages") from error
    prompt: list[int] = backend.tokenizer.encode(text, add_special_tokens=False).ids
    wanted, param = request.max_completion_tokens, "max_completion_tokens"
    if wanted is None:
        wanted, param = request.max_tokens, "max_tokens"
    room = backend.room(prompt, wanted, param)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    try:
        params = [
            request.sampling(max_tokens=room, index=index, logprobs=logprobs, echo=False)
            for index in range(request.n)
        ]
    except ConfigError as error:
        raise invalid(str(error), str(error).split()[0]) from error
    usage = Usage(prompt=len(prompt))
    deltas = backend.generate([prompt] * request.n, params)
    choices = [Choice(prompt=prompt) for _ in range(request.n)]

    def shown(choice: Choice) -> dict[str, Any] | None:
        if not request.logprobs:
            return None
        return chat_logprobs(backend.tokenizer, choice.tokens, choice.logprobs)

    if request.stream:

        def chunk(index: int, news: Choice, first: bool) -> list[dict[str, Any]]:
            common = {"index": index, "logprobs": None, "finish_reason": None}
            opening = [{**common, "delta": {"role": "assistant", "content": ""}}] if first else []
            delta = {"content": news.text} if news.text or not news.finish_reason else {}
            more = {"delta": delta, "logprobs": shown(news), "finish_reason": news.finish_reason}
            return [*opening, {**common, **more}]

        envelope = Envelope(
            kind="chat.completion.chunk", model=backend.model, version=backend.version, prefix="chatcmpl"
        )
        events = _stream(
            backend, deltas, choices, usage, envelope, chunk, include_usage=request.include_usage
        )
        return await _streaming(events)
    await _gather(deltas, choices, usage)
    envelope = Envelope(
        kind="chat.completion", model=backend.model, version=backend.version, prefix="chatcmpl"
    )
    bodies = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": shown(choice),
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    return JSONResponse(envelope.body(bodies, usage))


def _prompts(backend: Backend, given: str | Sequence[Any]) -> list[list[int]]:
    """Every prompt as tokens; an empty one begins where a text begins."""
    if isinstance(given, str):
        items: list[Any] = [given]
    elif given and isinstance(given[0], int):
        items = [given]
    else:
        items = list(given)
    encoded = [
        backend.tokenizer.encode(item, add_special_tokens=False).ids if isinstance(item, str) else list(item)
        for item in items
    ]
    return [tokens or [backend.end_of_text] for tokens in encoded]


async def _gather(deltas: AsyncIterator[tuple[int, Delta]], choices: list[Choice], usage: Usage) -> None:
    """Fill all choices.

    Raises:
        ApiError: the engine failed.
    """
    async for index, delta in deltas:
        if delta.error is not None:
            raise ApiError(503, delta.error, code="engine_failed", retry_after=1)
        choices[index].take(delta)
        usage.completion += len(delta.tokens)
        usage.cached[index] = delta.cached


async def _stream(
    backend: Backend,
    deltas: AsyncIterator[tuple[int, Delta]],
    choices: Sequence[Choice],
    usage: Usage,
    envelope: Envelope,
    parts: Callable[[int, Choice, bool], list[dict[str, Any]]],
    *,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events: chunks, a last one with the usage, and the end; or an error in their place."""
    begun: set[int] = set()
    pending: dict[str, Any] = {"usage": None} if include_usage else {}
    async for index, delta in deltas:
        if delta.error is not None:
            yield _event(ApiError(503, delta.error, code="engine_failed").body())
            return
        usage.completion += len(delta.tokens)
        usage.cached[index] = delta.cached
        news = Choice(prompt=choices[index].prompt)
        news.take(delta)
        for part in parts(index, news, index not in begun):
            yield _event({**envelope.body([part]), **pending})
        begun.add(index)
    if include_usage:
        yield _event(envelope.body([], usage))
    yield _DONE


async def _streaming(events: AsyncIterator[str]) -> StreamingResponse:
    """A stream, once its first event is there: what is refused at once is an error, and no stream."""
    first = await anext(events)

    async def all_events() -> AsyncIterator[str]:
        yield first
        async for event in events:
            yield event

    return StreamingResponse(
        all_events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


__all__ = ["build_api"]
