"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from errors import ConfigError, DataError, QueueFull, RaymoeError, ResourceError
from jobs.api.neutral_values import KNOWN
from jobs.api.request_bodies import BRANCHES

_LONGEST = 2000  # characters
_RETRY_SECONDS = 1
_KEY = "[key]"  # in the location of an error: the key of a dictionary and not its value


class ApiError(Exception):
    """An error that is sent to the client.

    Longer texts than `_LONGEST` are cut, because they can repeat what a request holds.

    Args:
        status: HTTP status.
        message: Description for people.
        param: Name of the wrong parameter.
        code: Identifier for programs.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(_short(message))
        self.status, self.message, self.code = status, _short(message), code
        self.param = None if param is None else _short(param)
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The response body."""
        return {
            "error": {
                "message": self.message,
                "type": _kind(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The response with body, status and headers."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:  # which has to name a scheme, RFC 9110, section 15.5.2
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


class ErrorDetail(BaseModel):
    """Details of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorDetail


def too_long(message: str, param: str) -> ApiError:
    """The error for a prompt that leaves no room, with the code that clients look for.

    Clients that do not read the code look for "maximum context length" or "exceed the configured limit".
    """
    return ApiError(400, message, param=param, code="context_length_exceeded")


def invalid(message: str, param: str | None = None) -> ApiError:
    """The error for an invalid parameter."""
    return ApiError(400, message, param=param, code="invalid_value")


def of_validation(error: RequestValidationError) -> ApiError:
    """The first validation error of a request body, with the path of the parameter (`messages[0].role`)."""
    first = error.errors()[0]
    kind, place = first["type"], first["loc"][1:]
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    param = _path(place)
    if param is None and kind == "value_error":
        # Fields that contradict each other: the message starts with one of them.
        return invalid(message, message.split()[0])
    if kind == "extra_forbidden":
        if place[-1] in KNOWN:
            return ApiError(
                400,
                f"{param} is not supported with this value; leave it out",
                param=param,
                code="unsupported_parameter",
            )
        return ApiError(400, f"unknown parameter {param!r}", param=param, code="unknown_parameter")
    if param is None and kind in ("model_attributes_type", "dict_type"):
        return invalid("the body is no JSON object; send one with Content-Type: application/json")
    if kind == "missing":
        return ApiError(
            400, f"{param or 'the body'} is missing", param=param, code="missing_required_parameter"
        )
    if place[-1:] == (_KEY,):
        message = "a key must be a token id"
    return invalid(f"{param}: {message}" if param else message, param)


def _path(place: Sequence[int | str]) -> str | None:
    """The path of a parameter in OpenAI's notation, from the location in an error of pydantic's."""
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in (*BRANCHES, _KEY):
            path += f".{part}" if path else part
    return path or None


async def accepted(submitted: Future[None] | asyncio.Future[None], source: str) -> None:
    """Wait until a choice is accepted.

    Args:
        submitted: What the service returned for it.
        source: The path of its prompt in the request, which errors about the prompt begin with.

    Raises:
        RaymoeError: It is refused.
    """
    try:
        await (asyncio.wrap_future(submitted) if isinstance(submitted, Future) else submitted)
    except ConfigError as error:
        text = str(error)
        if not text.startswith(("prompt ", "prompt[")):
            raise
        raise ConfigError(source + text.removeprefix("prompt")) from None


async def all_accepted(choices: Sequence[asyncio.Task[None]]) -> None:
    """Wait until all choices of a request are accepted.

    Args:
        choices: Tasks of `accepted`.

    Raises:
        ApiError: One is refused.
    """
    try:
        await asyncio.gather(*choices)
    except QueueFull as error:
        raise _queue_full(error) from error
    except ConfigError as error:
        text = str(error)
        raise invalid(text, text.split()[0]) from error
    except ResourceError as error:
        raise _failed(error) from error
    except RaymoeError as error:
        raise ApiError(500, str(error), code="request_failed") from error


@contextmanager
def refusals(param: str) -> Iterator[None]:
    """Answer errors of a confined process, for a request's parameter.

    Raises:
        ApiError: The process refuses the parameter's value, or cannot take it.
    """
    try:
        yield
    except DataError as error:
        raise invalid(str(error), param) from error
    except QueueFull as error:
        raise _queue_full(error) from error
    except ResourceError as error:
        raise _failed(error) from error


def _queue_full(error: QueueFull) -> ApiError:
    return ApiError(429, str(error), code="queue_full", retry_after=_RETRY_SECONDS)


def _failed(error: ResourceError) -> ApiError:
    return ApiError(503, str(error), code="engine_failed", retry_after=_RETRY_SECONDS)


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for bodies that do not match the schema."""
    assert isinstance(error, RequestValidationError)
    return of_validation(error).response()


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for unknown paths and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # FastAPI's own, if the JSON parser fails: depth, digits, bytes
        return ApiError(400, "the body cannot be read as JSON", code="invalid_json").response()
    answer = ApiError(error.status_code, str(error.detail)).response()
    for name, value in (error.headers or {}).items():
        # HEAD is answered where GET is, and routes do not list it.
        both = name.lower() == "allow" and value == "GET"
        answer.headers[name] = "GET, HEAD" if both else value
    return answer


async def answer_failure(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for unexpected exceptions."""
    return ApiError(500, f"{type(error).__name__}: {error}").response()


def _kind(status: int) -> str:
    known = {
        401: "authentication_error",
        404: "not_found_error",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


__all__ = [
    "ApiError",
    "ErrorBody",
    "ErrorDetail",
    "accepted",
    "all_accepted",
    "answer_api_error",
    "answer_failure",
    "answer_http_error",
    "answer_validation_error",
    "invalid",
    "of_validation",
    "refusals",
    "too_long",
]
