"""Answers to generation requests: whole, or as a stream of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from engine.delta import Delta
from errors import described
from jobs.api.api_errors import ApiError
from jobs.api.response_bodies import Choice, Envelope, Usage

Deltas = list[tuple[int, Delta]]
"""Deltas that are ready, each with the index of its choice."""

Parts = Callable[[int, Choice], list[dict[str, Any]]]
"""Makes the `choices` entries of a stream's chunks from the index of a choice and what is new of it."""

_DONE = "data: [DONE]\n\n"


async def gather(deltas: AsyncGenerator[Deltas, None], count: int, usage: Usage) -> tuple[list[Choice], str]:
    """Collect all deltas.

    Args:
        count: Number of choices.
        usage: Counts the tokens.

    Returns:
        The choices, and the version of the weights that computed the last token.

    Raises:
        ApiError: The engine failed.
    """
    choices = [Choice() for _ in range(count)]
    version = ""
    async with aclosing(deltas):
        async for ready in deltas:
            for index, delta in ready:
                raise_error_of(delta)
                choices[index].take(delta)
                usage.note(index, delta)
                version = delta.version
    return choices, version


async def streamed(
    deltas: AsyncGenerator[Deltas, None],
    usage: Usage,
    envelope: Envelope,
    parts: Parts,
    *,
    include_usage: bool,
) -> StreamingResponse:
    """A response of chunks, the usage if it was asked for, and `[DONE]`; an error event ends it early.

    Raises:
        ApiError: The request failed before the first chunk; the error has its own HTTP status.
    """
    events = _events(deltas, usage, envelope, parts, include_usage=include_usage)
    first = await anext(events)

    async def all_events() -> AsyncIterator[str]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return StreamingResponse(
        all_events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _events(
    deltas: AsyncGenerator[Deltas, None],
    usage: Usage,
    envelope: Envelope,
    parts: Parts,
    *,
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    """Server-sent events; a failure after the first ones is an event, before them it is raised."""
    pending: dict[str, Any] = {"usage": None} if include_usage else {}
    version, sent = "", False
    events: list[str] = []  # one write for all deltas that are ready
    try:
        async with aclosing(deltas):
            async for ready in deltas:
                for index, delta in ready:
                    raise_error_of(delta)
                    usage.note(index, delta)
                    version, news = delta.version, Choice()
                    news.take(delta)
                    events += [
                        _event({**envelope.body([part], version=version), **pending})
                        for part in parts(index, news)
                    ]
                yield "".join(events)
                events, sent = [], True
    except Exception as error:
        failed = ApiError(500, described(error), code="request_failed")
        failure = error if isinstance(error, ApiError) else failed
        if not sent and not events:
            raise failure from None
        yield "".join([*events, _event(failure.body())])
        return
    if include_usage:
        yield _event(envelope.body([], version=version, usage=usage))
    yield _DONE


def raise_error_of(delta: Delta) -> None:
    """Raise the error that ended a choice, if one did.

    Raises:
        ApiError: The request failed for a reason of its own (500), or the engine did (503).
    """
    if delta.error is not None and delta.own:
        raise ApiError(500, delta.error, code="request_failed")
    if delta.error is not None:
        raise ApiError(503, delta.error, code="engine_failed", retry_after=1)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


__all__ = ["Deltas", "gather", "raise_error_of", "streamed"]
