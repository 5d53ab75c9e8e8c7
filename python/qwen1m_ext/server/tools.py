"""Tools of a chat: what the template is told of them, and what the grammar makes of tool_choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..grammar import INLINE_JSON
from ..tokenizer import Message, Tokenizer
from .errors import ApiError
from .schemas import ChatBody, ChatMessage, NamedToolChoice, Tool
from .tool_calls import CLOSE, OPEN

ANY_TEXT = r"/(.|\n)*/"


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The `tools` of a chat template, as Hugging Face shapes them; `strict` is not for it."""
    if not tools:
        return None
    return [
        {
            "type": "function",
            "function": tool.function.model_dump(exclude_none=True, exclude={"strict"}),
        }
        for tool in tools
    ]


def template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The `messages` of a chat template.

    Templates tell the results of several calls apart by their order only, so results are put into
    the order of the calls that they name.

    Raises:
        RequestError: arguments that are no JSON object; a result of no call of the message before.
    """
    result: list[Message] = []
    calls: list[str] | None = None  # of the last message but results; None: it is not among these
    answers: list[tuple[int, Message]] = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        rendered: Message = {"role": role, "content": message.text()}
        if message.role == "tool":
            place = 0
            if calls is not None:
                if message.tool_call_id not in calls:
                    raise RequestError(
                        f"messages[{i}].tool_call_id: expected one of the tool_calls of the "
                        f"assistant's message before ({', '.join(calls) or 'there are none'}), "
                        f"got {message.tool_call_id!r}"
                    )
                place = calls.index(message.tool_call_id)
            answers.append((place, rendered))
            continue
        result += _in_order(answers)
        answers.clear()
        calls = [call.id for call in message.tool_calls or ()]
        if message.tool_calls:
            rendered["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(
                            call.function.arguments, f"messages[{i}].tool_calls[{j}]"
                        ),
                    },
                }
                for j, call in enumerate(message.tool_calls)
            ]
        result.append(rendered)
    return result + _in_order(answers)


def _in_order(answers: list[tuple[int, Message]]) -> list[Message]:
    return [message for _, message in sorted(answers, key=lambda answer: answer[0])]


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(
            f"{where}.function.arguments: expected a JSON object, got {text[:200]!r}"
        )
    return value


@dataclass(frozen=True)
class Calling:
    """What may be called in an answer."""

    names: frozenset[str]  # none: what looks like a call is text
    grammar: str | None  # Lark; None: the model is free


def calling(body: ChatBody, tokenizer: Tokenizer, answer_schema: dict[str, Any] | None) -> Calling:
    """Check `tools` and `tool_choice`.

    Args:
        body: of the request.
        tokenizer: its vocabulary may have the tags as tokens.
        answer_schema: of `response_format`, for an answer without calls.

    Raises:
        ApiError: a choice that does not fit the tools.
    """
    functions = {tool.function.name: tool.function for tool in body.tools or ()}
    if len(functions) < len(body.tools or ()):
        raise ApiError(400, "tools: expected functions of different names", param="tools")
    choice = body.tool_choice
    if not functions:
        if choice not in (None, "none"):
            raise ApiError(400, "tool_choice: expected together with tools", param="tool_choice")
        return Calling(frozenset(), None)
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        if name not in functions:
            raise ApiError(
                400,
                f"tool_choice: expected one of {', '.join(functions)}, got {name!r}",
                param="tool_choice",
            )
        functions = {name: functions[name]}
    single = body.parallel_tool_calls is False or isinstance(choice, NamedToolChoice)
    opening, closing = (
        tag if tokenizer.token_id(tag) is not None else json.dumps(tag) for tag in (OPEN, CLOSE)
    )
    calls = "call" if single else r'call ("\n" call)*'
    if choice == "none":
        if answer_schema is not None:
            return Calling(frozenset(), None)
        start = "start: PLAIN"
    elif choice not in (None, "auto"):
        start = f"start: {calls}"
    elif answer_schema is not None:
        start = f"start: answer | {calls}\nanswer: {_json(answer_schema)}"
    elif single or any(function.strict for function in functions.values()):
        later = "" if single else r' ("\n" call)*'
        head = f"head: PLAIN {opening}"
        if opening != OPEN:  # no token of its own: the text up to where the tag is complete
            head = f"head[lazy]: TEXT {opening}"
        start = f"start: PLAIN | head body{later}\n{head}"
    else:
        return Calling(frozenset(functions), None)
    lines = [
        "%llguidance {}",
        start,
        f"TEXT: {ANY_TEXT}",
        rf"PLAIN: {ANY_TEXT} & ~/(.|\n)*{OPEN}(.|\n)*/",
    ]
    if choice != "none":
        options = " | ".join(f"function_{i}" for i in range(len(functions)))
        lines += [
            f"call: {opening} body",
            rf'body: "\n{{\"name\": " ({options}) "}}\n" {closing}',
        ]
    for i, (name, function) in enumerate(functions.items() if choice != "none" else ()):
        parameters = function.parameters
        if parameters is None:
            parameters = {"properties": {}, "additionalProperties": False}
        head = json.dumps(json.dumps(name) + ', "arguments": ')
        lines.append(f"function_{i}: {head} {_json({'type': 'object'} | parameters)}")
    names = frozenset() if choice == "none" else frozenset(functions)
    return Calling(names, "\n".join(lines) + "\n")


def _json(schema: dict[str, Any]) -> str:
    """A rule's right side: a document of a schema."""
    try:
        return "%json " + json.dumps(INLINE_JSON | schema)
    except RecursionError:
        raise RequestError("tools: the schema is nested too deeply") from None
