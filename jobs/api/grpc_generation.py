"""Generation over gRPC: the messages of generation.proto, with the meaning of `/v1/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi.exceptions import RequestValidationError
from google.protobuf.message import Message
from pydantic import ValidationError

from engine.delta import Delta
from engine.sequence import TokenLogprobs
from jobs.api.answers import raise_error_of
from jobs.api.api_errors import invalid, of_validation
from jobs.api.backend import Backend
from jobs.api.completion_jobs import completion_job
from jobs.api.request_bodies import CompletionRequest
from jobs.api.response_bodies import Choice, CompletionView, Usage
from protos import generation_pb2
from protos.generation_pb2 import GenerateReply, GenerateRequest

_LONGEST_LIST = 4096


async def generate(backend: Backend, message: GenerateRequest) -> AsyncGenerator[GenerateReply, None]:
    """Replies to a request, as tokens are generated; closing the generator ends the generation.

    The caller has checked the API key, before it read the message.

    Raises:
        ApiError: The request is refused, or the engine failed.
    """
    with backend.admission.request():
        async with aclosing(_replies(backend, message)) as replies:
            async for reply in replies:
                yield reply


async def _replies(backend: Backend, message: GenerateRequest) -> AsyncGenerator[GenerateReply, None]:
    _refuse_wide(message, backend)
    request = completion_request(message)
    backend.check_model(request.model)
    job = await completion_job(backend, request)
    id = f"cmpl-{uuid.uuid4().hex}"
    usage = Usage(prompt=job.prompt_tokens, choices=request.n)
    wanted = request.logprobs is not None
    views = [
        CompletionView(backend.detokenizer, prompt, added=added, echo=request.echo, logprobs=wanted)
        for prompt, added in zip(job.prompts, job.added, strict=True)
    ]
    left = len(job.prompts)
    generated = backend.generate(job.prompts, job.params, choices=request.n, sources=job.sources)
    async with aclosing(generated) as deltas:
        async for index, delta in _each(deltas):
            raise_error_of(delta)
            news = Choice()
            news.take(delta)
            left -= delta.finish_reason is not None
            usage.note(index, delta)
            part = views[index].part(news)
            yield GenerateReply(
                id=id,
                model=backend.model,
                system_fingerprint=delta.version,
                index=index,
                text=part.text,
                token_ids=part.tokens,
                logprobs=_logprobs(part.logprobs) if wanted else (),
                finish_reason=part.finish_reason or "",
                usage=None if left else _usage(usage),
            )


async def _each(
    deltas: AsyncIterator[list[tuple[int, Delta]]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    async for ready in deltas:
        for one in ready:
            yield one


def _refuse_wide(message: GenerateRequest, backend: Backend) -> None:
    """Refuse lists that are longer than any valid one, before they become Python's objects, which are larger.

    Raises:
        ApiError: One is; the error names it.
    """
    backend.room(message.tokens.ids, 0, "max_tokens")
    most = max(_LONGEST_LIST, backend.tokenizer.get_vocab_size())
    for field in ("stop", "stop_token_ids", "logit_bias"):
        if (size := len(getattr(message, field))) > most:
            raise invalid(f"{field} has {size} entries; {most} at most", field)


def completion_request(message: GenerateRequest) -> CompletionRequest:
    """A message as the body of `POST /v1/completions`.

    Raises:
        ApiError: A parameter is invalid; the error names it.
    """
    values = {field.name: _plain(value) for field, value in message.ListFields()}
    for name in ("text", "tokens"):
        if name in values:
            values["prompt"] = values.pop(name)
    try:
        return CompletionRequest.model_validate(values)
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise of_validation(RequestValidationError(found)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, generation_pb2.TokenIds):
        return list(value.ids)
    if isinstance(value, str | bool | int | float):
        return value
    assert not isinstance(value, Message)
    # Keys are texts in JSON, and so are they in the paths of errors.
    return {str(key): item for key, item in value.items()} if hasattr(value, "items") else list(value)


def _logprobs(logprobs: Sequence[TokenLogprobs | None]) -> list[generation_pb2.Logprobs]:
    return [
        generation_pb2.Logprobs()
        if at is None
        else generation_pb2.Logprobs(
            token=at.token, top_ids=[t for t, _ in at.best], top=[value for _, value in at.best]
        )
        for at in logprobs
    ]


def _usage(usage: Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        total_tokens=usage.prompt + usage.completion,
        cached_tokens=usage.cached,
    )


__all__ = ["completion_request", "generate"]
