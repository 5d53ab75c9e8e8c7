"""POST /v1/chat/completions: the engine's events as OpenAI's chat objects."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine_process import SessionProxy
from ..events import Event, OutputDelta
from .errors import ApiError
from .generation import Generation
from .logprobs import chat_logprobs
from .prompts import Prompt, chat_prompt, continued_prompt
from .respond import respond
from .schemas import ChatBody
from .service import Service


class ChatShape:
    """One chat request: chunks while it streams, the whole object at its end."""

    def __init__(self, service: Service, body: ChatBody, generation: Generation) -> None:
        self._body, self._generation = body, generation
        self._tokenizer = service.tokenizer
        self._model = service.settings.served_name
        self._started: set[int] = set()
        self._choices: list[dict[str, Any]] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": {"content": [], "refusal": None} if body.logprobs else None,
                "finish_reason": None,
            }
            for index in range(body.n)
        ]

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._generation.request_id,
            "object": kind,
            "created": int(self._generation.created),
            "model": self._model,
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of the stream."""
        return self._head("chat.completion.chunk") | {"choices": choices}

    def render(self, prompt: int, event: Event) -> list[dict[str, Any]]:
        """The choices of the chunks that tell an event."""
        if not isinstance(event, OutputDelta):
            return []
        choices = []
        if event.index not in self._started:
            self._started.add(event.index)
            choices.append(self._delta(event.index, {"role": "assistant", "content": ""}))
        if event.text or event.logprobs or event.finish_reason:
            delta = {"content": event.text} if event.text or event.logprobs else {}
            choices.append(
                self._delta(event.index, delta)
                | {"logprobs": self._logprobs(event), "finish_reason": event.finish_reason}
            )
        return choices

    @staticmethod
    def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, event: OutputDelta) -> dict[str, Any] | None:
        if not self._body.logprobs or event.logprobs is None:
            return None
        top = self._body.top_logprobs or 0
        return chat_logprobs(self._tokenizer, event.token_ids, event.logprobs, top)

    def collect(self, prompt: int, event: Event) -> None:
        """Take an event into the whole object."""
        if isinstance(event, OutputDelta):
            choice = self._choices[event.index]
            choice["message"]["content"] += event.text
            choice["finish_reason"] = event.finish_reason
            logprobs = self._logprobs(event)
            if logprobs is not None:
                choice["logprobs"]["content"] += logprobs["content"]

    def whole(self) -> dict[str, Any]:
        """The finished object."""
        return self._head("chat.completion") | {
            "choices": self._choices,
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return self._generation.usage()


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""

        def prompts(session: SessionProxy | None) -> list[Prompt]:
            if not body.continue_session:
                return [chat_prompt(service.tokenizer, body.messages)]
            if session is None:
                raise ApiError(400, "continue_session: expected together with session")
            return [continued_prompt(service.engine, service.tokenizer, session, body.messages)]

        generation = await service.generate(
            request, body, "chatcmpl", prompts, alone=body.continue_session
        )
        return await respond(
            service, request, body, generation, ChatShape(service, body, generation)
        )

    return routes
