"""Tool calls in a growing answer, as Qwen2.5 writes them.

    text
    <tool_call>
    {"name": "look_up", "arguments": {"word": "sea"}}
    </tool_call>

A call begins where its arguments do: after the name of a declared function and `"arguments": {`.
From there on the arguments come out as they are written, to the letter. What is no beginning of a
call is text, to the last character; what breaks off within one is text from where it breaks.

The last brace of the arguments is kept until the call is seen to end, so that arguments are a JSON
object if, and only if, their call is complete. A call written otherwise (its keys in another order,
without arguments, its name with escapes) comes out when it is complete, or as text.

Where an answer is cut into pieces makes no difference to what the parts add up to.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from .json_prefix import JsonObject

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_SPACE = " \t\r\n"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*\{')


@dataclass(frozen=True)
class CallBegin:
    """A call of this function; its arguments follow."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """The next piece of the arguments of the call that began last."""

    text: str


Part = str | CallBegin | Arguments


class ToolCallParser:
    """Reads one answer.

    The white space before a call belongs to it; that after the last call as well.
    """

    def __init__(self, names: Collection[str]) -> None:
        """`names` of the functions that may be called."""
        self._names = frozenset(names)
        self._text = ""  # not yet given out: white space, the beginning of a tag, or a call
        self._call: _Call | None = None  # at the end of `_text`
        self.calls = 0  # complete ones so far

    def push(self, piece: str, final: bool = False) -> list[Part]:
        """Parts that a piece of the answer makes certain, in order; `final`: nothing follows."""
        parts: list[Part] = []
        self._text += piece
        while self._text and self._step(parts, final):
            pass
        return parts

    def _step(self, parts: list[Part], final: bool) -> bool:
        """Give out what can be; False: nothing more without more text."""
        if self._call is None:
            at = self._text.find(OPEN)
            if at < 0:
                kept = 0 if final else _tail(self._text)
                self._emit(parts, len(self._text) - kept, final)
                return False
            self._emit(parts, len(self._text[:at].rstrip(_SPACE)))
            self._call = _Call(self._text.index(OPEN) + len(OPEN), self._names)
        call = self._call
        call.scan(self._text, final)
        parts += call.take(self._text)
        if call.state == "open" and not final:
            return False
        self._call = None
        found = call.begun
        if call.state == "complete" and not found:
            whole = self._parse(call.body(self._text))
            parts += whole
            found = bool(whole)
        end = len(self._text) if call.state == "open" else call.position
        if call.state == "complete" and found:
            self.calls += 1
            self._text = self._text[end:]
        else:
            self._text = self._text[call.taken :]
            self._emit(parts, end - call.taken)
        return True

    def _emit(self, parts: list[Part], count: int, final: bool = False) -> None:
        """Give out the first characters as text; at the end not the white space after a call."""
        text, self._text = self._text[:count], self._text[count:]
        if final and self.calls:
            text = text.rstrip(_SPACE)
        if text:
            parts.append(text)

    def _parse(self, body: str) -> list[Part]:
        """A call that comes out as a whole; [] if it is none."""
        try:
            value = json.loads(body, parse_constant=_refuse)
            if not isinstance(value, dict) or not {"name"} <= set(value) <= {"name", "arguments"}:
                return []
            name, arguments = value["name"], value.get("arguments", {})
            if not isinstance(arguments, dict) or not isinstance(name, str):
                return []
            text = json.dumps(arguments, allow_nan=False)  # 1e999 is no number
        except (ValueError, RecursionError):
            return []
        return [CallBegin(name), Arguments(text)] if name in self._names else []


class _Call:
    """What follows an opening tag; every character is looked at once."""

    def __init__(self, begin: int, names: Collection[str]) -> None:
        """`begin`: of what follows the tag, in the texts that `scan` gets."""
        self.position = begin  # all before it has been looked at
        self.state = "open"  # or "complete" (`position` is its end) or "broken" (text up to there)
        self.begun = False
        self.taken = 0  # once begun: all before it is told
        self._names = names
        self._json = JsonObject()
        self._begin = begin
        self._nested = False  # something within the object has been seen
        self._name: str | None = None  # begun, not yet told
        self._arguments_end: int | None = None
        self._end: int | None = None  # of the object

    def body(self, text: str) -> str:
        """The JSON object of a complete call."""
        return text[self._begin : self._end]

    def scan(self, text: str, final: bool) -> None:
        """Go on in a text that has become longer."""
        while self._end is None and self.state == "open" and self.position < len(text):
            self._look(text)
        if self._end is not None and self.state == "open":
            self._look_for_tag(text)
        if final and self.state == "open" and (self._end or self._arguments_end):
            # Only the end of the wrapping is missing. The beginning of another call is text.
            self.state = "complete"
            if CLOSE.startswith(text[self.position :]):
                self.position = len(text)

    def take(self, text: str) -> list[Part]:
        """What may be told of a call that has begun, and has not been."""
        if not self.begun:
            return []
        parts: list[Part] = []
        if self._name is not None:
            parts.append(CallBegin(self._name))
            self._name = None
        stop = self.position
        if self._arguments_end is not None:
            stop = self._arguments_end - (self.state != "complete")
        if stop > self.taken:
            parts.append(Arguments(text[self.taken : stop]))
            self.taken = stop
        return parts

    def _look(self, text: str) -> None:
        """At the next character of the object."""
        character = text[self.position]
        only_closes = self._arguments_end is not None
        if (only_closes and character not in "}" + _SPACE) or not self._json.push(character):
            self.state = "broken"
            return
        self.position += 1
        if self._json.depth == 2 and not self._nested:
            self._nested = True
            head = _HEAD.fullmatch(text, self._begin, self.position)
            if head is not None and head[1] in self._names:
                self.begun, self._name, self.taken = True, head[1], self.position - 1
        elif self.begun and self._json.depth == 1 and not only_closes:
            self._arguments_end = self.position
        if self._json.done:
            self._end = self.position

    def _look_for_tag(self, text: str) -> None:
        """Behind the object; where the next call begins, the closing tag was forgotten."""
        while self.position < len(text) and text[self.position] in _SPACE:
            self.position += 1
        tag = text[self.position : self.position + len(CLOSE)]
        if tag == CLOSE:
            self.position += len(CLOSE)
            self.state = "complete"
        elif tag.startswith(OPEN):
            self.state = "complete"
        elif not CLOSE.startswith(tag) and not OPEN.startswith(tag):
            self.state = "broken"


def _tail(text: str) -> int:
    """Characters at the end that may turn out to belong to a call."""
    for length in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if text.endswith(OPEN[:length]):
            break
    else:
        length = 0
    return len(text) - len(text[: len(text) - length].rstrip(_SPACE))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def begin_entry(name: str) -> dict[str, Any]:
    """The beginning of a call as OpenAI writes it, with a new id."""
    function = {"name": name, "arguments": ""}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
