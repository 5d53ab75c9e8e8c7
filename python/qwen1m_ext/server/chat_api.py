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
from .prompts import Prompt, chat_prompt, continued_prompt, json_schema
from .respond import respond
from .schemas import ChatBody
from .service import Service
from .tool_calls import Arguments, Part, ToolCallParser, begin_entry
from .tools import Calling, calling


class ChatShape:
    """One chat request: chunks while it streams, the whole object at its end."""

    def __init__(
        self, service: Service, body: ChatBody, generation: Generation, tools: Calling
    ) -> None:
        self._body, self._generation = body, generation
        self._parsers = [ToolCallParser(tools.names) for _ in range(body.n if tools.names else 0)]
        self._tokenizer = service.tokenizer
        self._model = service.settings.served_name
        self._started: set[int] = set()
        self._calls: dict[int, int] = {}  # begun so far, by sample
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
            deltas = [self._part(event.index, part) for part in self._parts(event)]
            if not deltas:
                deltas = [{"content": ""} if event.logprobs else {}]
            choices += [self._delta(event.index, delta) for delta in deltas]
            choices[-1]["logprobs"] = self._logprobs(event)
            choices[-1]["finish_reason"] = self._finish_reason(event)
        return choices

    def _parts(self, event: OutputDelta) -> list[Part]:
        """What an event brings of the text and of calls."""
        if self._parsers:
            return self._parsers[event.index].push(event.text, event.finish_reason is not None)
        return [event.text] if event.text else []

    def _part(self, index: int, part: Part) -> dict[str, Any]:
        """The delta of one of them; a call's number counts those of its sample."""
        if isinstance(part, str):
            return {"content": part}
        begun = self._calls.get(index, 0)
        if isinstance(part, Arguments):
            return {"tool_calls": [{"index": begun - 1, "function": {"arguments": part.text}}]}
        self._calls[index] = begun + 1
        return {"tool_calls": [{"index": begun} | begin_entry(part.name)]}

    def _finish_reason(self, event: OutputDelta) -> str | None:
        called = bool(self._parsers) and self._parsers[event.index].calls > 0  # complete ones
        return "tool_calls" if called and event.finish_reason == "stop" else event.finish_reason

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
            for part in self._parts(event):
                delta = self._part(event.index, part)
                if "content" in delta:
                    choice["message"]["content"] += delta["content"]
                for call in delta.get("tool_calls", ()):
                    calls = choice["message"].setdefault("tool_calls", [])
                    if call.pop("index") == len(calls):
                        calls.append(call)
                    else:
                        calls[-1]["function"]["arguments"] += call["function"]["arguments"]
            choice["finish_reason"] = self._finish_reason(event)
            logprobs = self._logprobs(event)
            if logprobs is not None:
                choice["logprobs"]["content"] += logprobs["content"]

    def whole(self) -> dict[str, Any]:
        """The finished object."""
        for choice in self._choices:
            message = choice["message"]
            if "tool_calls" in message and not message["content"]:
                message["content"] = None
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
                return [chat_prompt(service.tokenizer, body.messages, body.tools)]
            if session is None:
                raise ApiError(400, "continue_session: expected together with session")
            return [continued_prompt(service.engine, service.tokenizer, session, body.messages)]

        tools = calling(body, service.tokenizer, json_schema(body))
        generation = await service.generate(
            request, body, "chatcmpl", prompts, alone=body.continue_session, grammar=tools.grammar
        )
        shape = ChatShape(service, body, generation, tools)
        return await respond(service, request, body, generation, shape)

    return routes
