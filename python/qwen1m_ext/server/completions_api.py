"""POST /v1/completions: text or token ids, several prompts, echo, log probabilities."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..events import Event, OutputDelta, PromptScored
from .generation import Generation
from .logprobs import completion_logprobs, token_text
from .prompts import completion_prompts
from .respond import respond
from .schemas import CompletionBody
from .service import Service


class CompletionShape:
    """One completion request; choice number = prompt * n + sample."""

    def __init__(self, service: Service, body: CompletionBody, generation: Generation) -> None:
        self._body, self._generation = body, generation
        self._tokenizer = service.tokenizer
        self._model = service.settings.served_name
        self._echoed: set[int] = set()
        self._offsets: dict[int, int] = {}  # of the next token's text, by choice
        self._prompt_rows: dict[int, PromptScored] = {}
        count = len(generation.prompts) * body.n
        self._choices = [self._choice(index) for index in range(count)]

    def _choice(self, index: int, text: str = "") -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of the stream, or the head of the whole object."""
        return {
            "id": self._generation.request_id,
            "object": "text_completion",
            "created": int(self._generation.created),
            "model": self._model,
            "choices": choices,
        }

    def render(self, prompt: int, event: Event) -> list[dict[str, Any]]:
        """The choices of the chunks that tell an event."""
        if isinstance(event, PromptScored):
            self._prompt_rows[prompt] = event
        if not isinstance(event, OutputDelta):
            return []
        index = prompt * self._body.n + event.index
        choices = []
        if self._body.echo and index not in self._echoed:
            self._echoed.add(index)
            choices.append(self._echo(prompt, index))
        hidden = self._body.max_tokens == 0  # the token that the engine has to draw is not shown
        if event.text or event.logprobs or event.finish_reason:
            choice = self._choice(index, "" if hidden else event.text)
            choice["finish_reason"] = "length" if hidden else event.finish_reason
            if event.logprobs is not None and not hidden:
                choice["logprobs"] = self._logprobs(index, event.token_ids, event.logprobs)
            choices.append(choice)
        return choices

    def _echo(self, prompt: int, index: int) -> dict[str, Any]:
        """The choice that repeats the prompt, with its log probabilities if asked for."""
        given = self._generation.prompts[prompt]
        text = given.text
        if text is None:
            text = self._tokenizer.decode(given.token_ids, False)
        choice = self._choice(index, text)
        if self._body.logprobs is not None:
            rows = self._prompt_rows[prompt].logprobs
            choice["logprobs"] = self._logprobs(index, given.token_ids, rows)
        return choice

    def _logprobs(self, index: int, tokens: list[int], rows: Any) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        last = tokens[-1:]
        result = completion_logprobs(
            self._tokenizer, tokens, rows, self._body.logprobs or 0, offset
        )
        if last:
            length = len(token_text(self._tokenizer, last[0]))
            self._offsets[index] = result["text_offset"][-1] + length
        return result

    def collect(self, prompt: int, event: Event) -> None:
        """Take an event into the whole object."""
        for part in self.render(prompt, event):
            choice = self._choices[part["index"]]
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                if choice["logprobs"] is None:
                    choice["logprobs"] = {name: [] for name in part["logprobs"]}
                for name, values in part["logprobs"].items():
                    choice["logprobs"][name] += values

    def whole(self) -> dict[str, Any]:
        """The finished object."""
        return self.chunk(self._choices) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        usage = self._generation.usage()
        if self._body.max_tokens == 0:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        generation = await service.generate(
            request, body, "cmpl", lambda _: completion_prompts(service.tokenizer, body)
        )
        shape = CompletionShape(service, body, generation)
        return await respond(service, request, body, generation, shape)

    return routes
