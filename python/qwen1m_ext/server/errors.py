"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

The engine's classes become status codes here and nowhere else.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ..errors import BackendError, ContextTooLong, MemoryBudgetError, RequestError, SessionFileError

log = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""The request was cancelled (nginx's number); nobody may be left to read it."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    CLIENT_CLOSED: "request_cancelled",
}


class ApiError(HTTPException):
    """An error with its status, for the client. FastAPI lets HTTPExceptions pass."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after`: seconds after which the same request may succeed."""
        super().__init__(status, message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object that says it."""
        kind = _TYPES.get(self.status) or (
            "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The HTTP response that says it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(), self.status, headers)


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON in ASCII: an error text may quote what is no Unicode, such as a lone surrogate."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(text, status, dict(headers or {}), "application/json")


def api_error(error: BaseException) -> ApiError:
    """What the client is told about an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextTooLong):
        return ApiError(400, str(error), param="prompt", code="context_length_exceeded")
    if isinstance(error, RequestError):
        named = re.match(r"(\w+)(\[\d+\])?[.:]", str(error))
        return ApiError(400, str(error), param=named[1] if named else None)
    if isinstance(error, SessionFileError):
        return ApiError(409, str(error), param="session", code="session_file_refused")
    if isinstance(error, MemoryBudgetError):
        return ApiError(503, str(error), code="out_of_memory", retry_after=10)
    if isinstance(error, BackendError):  # the engine's process died; another is being started
        return ApiError(503, str(error), code="engine_unavailable", retry_after=5)
    if isinstance(error, RecursionError):  # a parser's limit is not that of those who come after it
        return ApiError(400, "body: nested too deeply", code="json_invalid")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ApiError(507, f"no room to write: {error}", code="storage_full")
    log.error("request failed", exc_info=error)
    return ApiError(500, f"{type(error).__name__}: {error}", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Every error of the application goes out in OpenAI's shape."""

    async def known(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404 and message == "Not Found":
            message = f"there is no {request.method} {request.url.path}"
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error).response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, known)
    for kind in (
        ApiError,
        RequestError,
        SessionFileError,
        MemoryBudgetError,
        BackendError,
        OSError,
        RecursionError,
    ):
        app.add_exception_handler(kind, known)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body: field, expectation, value."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(path) or "body"
    if first["type"] == "json_invalid":
        where = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(400, f"body: not valid JSON: {where}", code="json_invalid")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"{name}: unknown or unsupported field; it could change the result, "
            "so it is not ignored",
            param=name,
            code="unknown_field",
        )
    got = repr(first.get("input"))
    got = got if len(got) <= 200 else got[:200] + "..."
    message = f"{name}: {first['msg']}, got {got}"
    return ApiError(400, message, param=path[0] if path else None)
