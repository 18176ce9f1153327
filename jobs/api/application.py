"""The HTTP routes of the OpenAI-compatible interface."""

# No `from __future__ import annotations`: FastAPI could not read the routes' types, which are local here.
import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from errors import ConfigError
from jobs.api.admission import AdmissionGate
from jobs.api.answers import gather, streamed
from jobs.api.api_errors import (
    ApiError,
    ErrorBody,
    answer_api_error,
    answer_failure,
    answer_http_error,
    answer_validation_error,
    invalid,
)
from jobs.api.backend import Backend
from jobs.api.body_limit import BodyBounds, BodyLimit
from jobs.api.completion_jobs import MAX_CHOICES, completion_job
from jobs.api.head_requests import HeadRequests
from jobs.api.key_check import KeyCheck
from jobs.api.logprob_bodies import chat_logprobs, completion_logprobs
from jobs.api.request_bodies import ChatRequest, CompletionRequest
from jobs.api.response_bodies import Choice, CompletionView, Envelope, Usage

_OTHER_VALUES = 10_000  # of a body, beside the tokens of its prompts
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or a stream of its chunks.", "content": {"text/event-stream": {}}}
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ErrorBody}
    for status, text in {
        400: "A parameter cannot be.",
        401: "No valid API key.",
        404: "No such model.",
        408: "The body came too slowly.",
        413: "The body is too large, or has too many values.",
        429: "The queue is full; come back after Retry-After seconds.",
        500: "The request failed in a way of its own; it would fail again.",
        503: "The server shuts down, or engine or experts failed; come back after Retry-After seconds.",
    }.items()
}


def build_api(find: Callable[[], Backend]) -> FastAPI:
    """The HTTP application of the model whose backend `find` returns for every request."""
    api = _without_routes(find)

    Allowed = Annotated[Backend, Depends(find)]

    @api.get("/health", responses={503: _ERRORS[503]})
    async def health() -> Response:
        """Return 200 if every expert has a live host, else 503 with the reason."""
        reason = await find().health()
        if reason is not None:
            return ApiError(503, reason, retry_after=1).response()
        return JSONResponse({"status": "ok"})

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        backend = find()
        backend.metrics.engines, backend.metrics.experts = await asyncio.gather(
            backend.engines(), backend.experts()
        )
        return Response(backend.metrics.exposition(), media_type="text/plain; version=0.0.4")

    @api.get("/v1/models", responses=_ERRORS)
    @api.get("/v1/models/", include_in_schema=False)
    def models(backend: Allowed) -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": [_card(backend)]}

    @api.get("/v1/models/{name:path}", responses=_ERRORS)
    def model(name: str, backend: Allowed) -> dict[str, Any]:
        """Describe one model."""
        backend.check_model(name)
        return _card(backend)

    @api.post("/v1/completions", responses={**_STREAM, **_ERRORS})
    async def completions(request: CompletionRequest, backend: Allowed) -> Response:
        """Continue a text."""
        backend.check_model(request.model)
        return await _complete(backend, request)

    @api.post("/v1/chat/completions", responses={**_STREAM, **_ERRORS})
    async def chat(request: ChatRequest, backend: Allowed) -> Response:
        """Answer the last message of a conversation."""
        backend.check_model(request.model)
        return await _chat(backend, request)

    _describe_without_422(api)
    return api


def _without_routes(find: Callable[[], Backend]) -> FastAPI:
    """An application with everything that is the same for all routes."""
    api = FastAPI(title="raymoe", description="OpenAI-compatible interface of a served model.")
    api.add_exception_handler(ApiError, answer_api_error)
    api.add_exception_handler(RequestValidationError, answer_validation_error)
    api.add_exception_handler(HTTPException, answer_http_error)
    api.add_exception_handler(Exception, answer_failure)
    api.add_middleware(BodyLimit, bounds=lambda: _body_bounds(find()))
    api.add_middleware(KeyCheck, find=find)
    api.add_middleware(AdmissionGate, find=lambda: find().admission)
    api.add_middleware(HeadRequests)
    return api


def _body_bounds(backend: Backend) -> BodyBounds:
    return BodyBounds(
        arriving=backend.arriving,
        memory=backend.bodies,
        rate=float(backend.limits.body_rate),
        values=MAX_CHOICES * backend.longest + _OTHER_VALUES,
    )


def _describe_without_422(api: FastAPI) -> None:
    """Remove status 422 from the OpenAPI document: FastAPI lists it, and our handlers answer 400 instead."""
    document = api.openapi

    def without_422() -> dict[str, Any]:
        made = document()
        for operations in made["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return made

    api.openapi = without_422  # type: ignore[method-assign]  # FastAPI's own way to change the document


def _card(backend: Backend) -> dict[str, Any]:
    return {
        "id": backend.model,
        "object": "model",
        "created": backend.created,
        "owned_by": "raymoe",
        "max_model_len": backend.longest,
        "version": backend.version(),
    }


async def _complete(backend: Backend, request: CompletionRequest) -> Response:
    job = await completion_job(backend, request)
    usage = Usage(prompt=job.prompt_tokens, choices=request.n)
    envelope = Envelope(kind="text_completion", model=backend.model, prefix="cmpl")
    deltas = backend.generate(job.prompts, job.params, choices=request.n, sources=job.sources)
    wanted = request.logprobs is not None
    views = [
        CompletionView(backend.detokenizer, prompt, added=added, echo=request.echo, logprobs=wanted)
        for prompt, added in zip(job.prompts, job.added, strict=True)
    ]

    def part(index: int, news: Choice) -> dict[str, Any]:
        """A choice, or its new part."""
        seen = views[index].part(news)
        logprobs = None
        if wanted:
            logprobs = completion_logprobs(backend.detokenizer, seen.tokens, seen.logprobs, seen.offsets)
        return {"index": index, "text": seen.text, "logprobs": logprobs, "finish_reason": seen.finish_reason}

    if request.stream:
        return await streamed(
            deltas,
            usage,
            envelope,
            lambda index, news: [part(index, news)],
            include_usage=request.include_usage,
        )
    choices, version = await gather(deltas, len(job.prompts), usage)
    parts = [part(index, choice) for index, choice in enumerate(choices)]
    return JSONResponse(envelope.body(parts, version=version, usage=usage))


async def _chat(backend: Backend, request: ChatRequest) -> Response:
    prompt = await backend.chat_prompt([message.plain() for message in request.messages])
    request = backend.completed(request)
    wanted, param = request.max_completion_tokens, "max_completion_tokens"
    if wanted is None:
        wanted, param = request.max_tokens, "max_tokens"
    room = backend.room(prompt, wanted, param, source="messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    try:
        params = [
            request.sampling(max_tokens=room, index=index, logprobs=logprobs, echo=False)
            for index in range(request.n)
        ]
    except ConfigError as error:
        raise invalid(str(error), str(error).split()[0]) from error
    usage = Usage(prompt=len(prompt), choices=request.n)
    deltas = backend.generate([prompt] * request.n, params, choices=request.n)

    def logprobs_of(choice: Choice) -> dict[str, Any] | None:
        if not request.logprobs:
            return None
        return chat_logprobs(backend.detokenizer, choice.tokens, choice.logprobs)

    if request.stream:
        begun: set[int] = set()

        def chunks(index: int, news: Choice) -> list[dict[str, Any]]:
            common = {"index": index, "logprobs": None, "finish_reason": None}
            opening = (
                [{**common, "delta": {"role": "assistant", "content": ""}}] if index not in begun else []
            )
            begun.add(index)
            delta = {"content": news.text} if news.text or not news.finish_reason else {}
            more = {"delta": delta, "logprobs": logprobs_of(news), "finish_reason": news.finish_reason}
            return [*opening, {**common, **more}]

        envelope = Envelope(kind="chat.completion.chunk", model=backend.model, prefix="chatcmpl")
        return await streamed(deltas, usage, envelope, chunks, include_usage=request.include_usage)
    choices, version = await gather(deltas, request.n, usage)
    envelope = Envelope(kind="chat.completion", model=backend.model, prefix="chatcmpl")
    bodies = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": logprobs_of(choice),
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    return JSONResponse(envelope.body(bodies, version=version, usage=usage))


__all__ = ["build_api"]
