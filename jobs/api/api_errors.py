"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException


class ApiError(Exception):
    """An error that is sent to the client.

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
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
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
        headers = None if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


class ErrorDetail(BaseModel):
    """Details of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorDetail


def invalid(message: str, param: str | None = None) -> ApiError:
    """The error for an invalid parameter."""
    return ApiError(400, message, param=param, code="invalid_value")


def of_validation(error: RequestValidationError) -> ApiError:
    """The first validation error of a request body, with the name of the wrong parameter."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    param = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
    if (
        param is None and first["type"] == "value_error"
    ):  # fields that contradict each other: the message starts with one of them
        param = message.split()[0]
        return invalid(message, param)
    if first["type"] == "extra_forbidden":
        path = ".".join(map(str, first["loc"][1:]))
        return ApiError(400, f"unknown parameter {path!r}", param=path, code="unknown_parameter")
    if len(first["loc"]) == 1 and first["type"] in ("model_attributes_type", "dict_type"):
        return invalid("the body is no JSON object; send one with Content-Type: application/json")
    if first["type"] == "missing":
        return ApiError(
            400, f"{param or 'the body'} is missing", param=param, code="missing_required_parameter"
        )
    return invalid(f"{param}: {message}" if param else message, param)


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
    answer.headers.update(error.headers or {})  # Allow, with 405
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
    "answer_api_error",
    "answer_failure",
    "answer_http_error",
    "answer_validation_error",
    "invalid",
    "of_validation",
]
