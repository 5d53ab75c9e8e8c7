"""What every request passes first: the API key and the size of its body."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics"})
"""Need no key: no prompt, no answer and no session can be read there."""


class Gate:
    """ASGI middleware; does not touch responses, so streams pass unbuffered."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._limit = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with 401 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            if self._keys and scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self._limit:
                raise self._too_large(int(length))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:  # a chunked body does not say its length before
                raise self._too_large(received)
            return message

        await self._app(scope, counted, send)

    def _check_key(self, header: bytes) -> None:
        scheme, _, key = header.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(401, "Authorization: expected a valid API key", code="invalid_api_key")

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            413, f"body: expected at most {self._limit} bytes, got {size}", code="body_too_large"
        )
