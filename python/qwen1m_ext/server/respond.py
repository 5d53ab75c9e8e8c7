"""The end of a request's way: its events as a stream, or as one object when all are in."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from ..events import Event, Progress
from .errors import CLIENT_CLOSED, ApiError, json_response
from .generation import Generation
from .schemas import GenerationBody
from .service import Service
from .streaming import EventStream, progress_chunk


class Shape(Protocol):
    """How an endpoint writes events."""

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of the stream."""

    def render(self, prompt: int, event: Event) -> list[dict[str, Any]]:
        """The choices of the chunks that tell an event, one chunk each."""

    def collect(self, prompt: int, event: Event) -> None:
        """Take an event into the whole object."""

    def whole(self) -> dict[str, Any]:
        """The finished object."""

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""


async def respond(
    service: Service, request: Request, body: GenerationBody, generation: Generation, shape: Shape
) -> Response:
    """A submitted generation's response; it is closed whatever happens."""

    async def finish() -> None:
        await asyncio.shield(service.finish(generation))

    if not body.stream:
        try:
            whole = await _collected(request, generation, shape)
        finally:
            await finish()
        return json_response(whole, headers={"X-Request-Id": generation.request_id})

    with_usage = body.stream_options is not None and body.stream_options.include_usage

    def render(prompt: int, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, Progress):
            return [shape.chunk([]) | progress_chunk(event)]
        return [shape.chunk([choice]) for choice in shape.render(prompt, event)]

    def last() -> list[dict[str, Any]]:
        return [shape.chunk([]) | {"usage": shape.usage()}] if with_usage else []

    return EventStream(generation, render, last, service.settings.keep_alive_seconds, finish)


async def _collected(request: Request, generation: Generation, shape: Shape) -> dict[str, Any]:
    """The whole object. Raises ApiError 499 if the client goes before it is done."""

    async def collect() -> None:
        async for item in generation.events():
            if item is not None:
                shape.collect(*item)

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.create_task(collect()), asyncio.create_task(until_gone())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(CLIENT_CLOSED, "the client has gone", code="request_cancelled")
        await work
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
    return shape.whole()
