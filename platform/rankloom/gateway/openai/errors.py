"""Errors in OpenAI's shape, and the one mapping from rankloom's errors to HTTP statuses."""

from __future__ import annotations

from math import ceil
from typing import Any

from pydantic import BaseModel

from rankloom.engine.jobs import ContextError, ReplicaLostError
from rankloom.errors import (
    AdapterNotFoundError,
    ConfigError,
    IncompatibleError,
    OverloadedError,
    RegistryError,
    RequestError,
)
from rankloom.gateway.errors import NameTakenError, NotLoadedError, RateLimitedError


class WireError(Exception):
    """The error that a client receives in place of a response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.retry_after_s = retry_after_s

    def make_body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def make_headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, ceil(self.retry_after_s)))}


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    """The request's key that is wrong."""
    code: str | None
    """A constant that programs can compare."""


class ErrorReply(BaseModel):
    """The body of every error response, for the API's document."""

    error: ErrorFacts


def to_wire_error(error: Exception) -> WireError:
    """Map an exception to the client's error; internals go to the log only."""
    text = str(error)
    match error:
        case WireError():
            return error
        case ContextError():
            return WireError(400, text, code="context_length_exceeded", param="messages")
        case RequestError():
            return WireError(400, text)
        case NameTakenError():
            return WireError(400, text, param="lora_name")
        case NotLoadedError():
            return WireError(404, text, code="model_not_found", param="lora_name")
        case AdapterNotFoundError():
            return WireError(404, text, code="model_not_found", param="model")
        case RegistryError() | IncompatibleError():
            return WireError(422, f"The adapter was refused: {text}", code="adapter_refused", param="model")
        case ConfigError():
            return WireError(400, text)
        case RateLimitedError():
            after_s = error.retry_after_s
            return WireError(429, text, code="rate_limit_exceeded", kind=error.resource, retry_after_s=after_s)
        case OverloadedError():
            return WireError(503, text, code="overloaded", retry_after_s=error.retry_after_s)
        case ReplicaLostError():
            return WireError(503, "The replica that wrote this answer was lost; ask again.", code="replica_lost")
        case TimeoutError():
            return WireError(504, "The request took longer than this endpoint allows.", code="timeout")
    return WireError(500, "Internal error; the endpoint's log has more under this x-request-id.")
