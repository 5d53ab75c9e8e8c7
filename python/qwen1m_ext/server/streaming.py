"""Server-sent events: headers at once, comments during silence, errors as a last event."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..events import Event, Progress
from .errors import api_error
from .generation import Generation

Render = Callable[[int, Event], list[dict[str, Any]]]
"""(prompt, event) -> the chunks that tell it."""


def _data(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, allow_nan=False, separators=(',', ':'))}\n\n".encode()


def progress_chunk(progress: Progress) -> dict[str, Any]:
    """The field `prompt_progress` of a chunk without choices."""
    return {
        "prompt_progress": {
            "done": progress.done,
            "total": progress.total,
            "cached": progress.cached,
            "eta_ms": None if progress.eta is None else round(1000 * progress.eta),
            "time_ms": round(1000 * progress.elapsed),
        }
    }


class EventStream(StreamingResponse):
    """The stream of a generation. However it ends, the generation is closed with it."""

    def __init__(
        self,
        generation: Generation,
        render: Render,
        last: Callable[[], list[dict[str, Any]]],
        keep_alive_seconds: float,
        close: Callable[[], Any],
    ) -> None:
        """`last`: the chunks after the last event (usage); `close`: awaited at the end."""
        self._generation, self._render, self._last = generation, render, last
        self._keep_alive, self._close = keep_alive_seconds, close
        headers = {
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",  # nginx would hold the events back
            "X-Request-Id": generation.request_id,
        }
        super().__init__(self._chunks(), media_type="text/event-stream", headers=headers)

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield f": {self._generation.request_id}\n\n".encode()
        try:
            async for item in self._generation.events(self._keep_alive):
                if item is None:
                    yield b": keep-alive\n\n"
                    continue
                for chunk in self._render(*item):
                    yield _data(chunk)
            for chunk in self._last():
                yield _data(chunk)
        except Exception as error:  # the status is out; an event has to tell it
            yield _data(api_error(error).body())
        yield b"data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a client that has gone cancels the generation."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()
