"""Tool calls in a growing answer, as Qwen2.5 writes them.

    text
    <tool_call>
    {"name": "look_up", "arguments": {"word": "sea"}}
    </tool_call>

What is no valid call of a declared function is text, to the last character. Where a text is cut
into pieces makes no difference: pieces of text may come out otherwise, what they add up to not.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_SPACE = " \t\r\n"


@dataclass(frozen=True)
class ToolCall:
    """A complete call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


Part = str | ToolCall


class ToolCallParser:
    """Reads one answer. A call comes out when it is complete: only then it is known to be one.

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
            self._call = _Call(self._text.index(OPEN) + len(OPEN))
        call = self._call
        call.scan(self._text, final)
        if call.state == "open" and not final:
            return False
        found = self._parse(call.body(self._text)) if call.state == "complete" else None
        end = len(self._text) if call.state == "open" else call.position
        self._call = None
        if found is None:
            self._emit(parts, end)
        else:
            parts.append(found)
            self.calls += 1
            self._text = self._text[end:]
        return True

    def _emit(self, parts: list[Part], count: int, final: bool = False) -> None:
        """Give out the first characters as text; at the end not the white space after a call."""
        text, self._text = self._text[:count], self._text[count:]
        if final and self.calls:
            text = text.rstrip(_SPACE)
        if text:
            parts.append(text)

    def _parse(self, body: str) -> ToolCall | None:
        try:
            value = json.loads(body, parse_constant=_refuse)
            if not isinstance(value, dict) or not {"name"} <= set(value) <= {"name", "arguments"}:
                return None
            name, arguments = value["name"], value.get("arguments", {})
            if not isinstance(arguments, dict) or not isinstance(name, str):
                return None
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 is no number
        except (ValueError, RecursionError):
            return None
        return ToolCall(name, text) if name in self._names else None


class _Call:
    """Finds the end of a call, looking at every character once."""

    def __init__(self, begin: int) -> None:
        """`begin`: of what follows the opening tag."""
        self.position = begin  # all before it has been looked at
        self.state = "open"  # or "complete" (`position` is its end) or "broken" (text up to there)
        self._begin = begin
        self._end: int | None = None  # of the JSON object
        self._depth, self._quoted, self._escaped = 0, False, False

    def body(self, text: str) -> str:
        """The JSON object of a complete call."""
        return text[self._begin : self._end]

    def scan(self, text: str, final: bool) -> None:
        """Go on in a text that has become longer."""
        while self._end is None and self.state == "open" and self.position < len(text):
            self._look(text[self.position])
        if self._end is None or self.state != "open":
            return
        rest = text[self._end :]
        tag = rest.lstrip(_SPACE)
        if tag.startswith(CLOSE):
            self.position = self._end + len(rest) - len(tag) + len(CLOSE)
            self.state = "complete"
        elif not CLOSE.startswith(tag):
            self.position, self.state = self._end, "broken"
        elif final:  # only the closing tag is missing, or a part of it
            self.position, self.state = len(text), "complete"

    def _look(self, character: str) -> None:
        if self._depth == 0 and character not in "{" + _SPACE:
            self.state = "broken"
            return
        self.position += 1
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._quoted = False
        elif character == '"':
            self._quoted = True
        elif character == "{":
            self._depth += 1
        elif character == "}":
            self._depth -= 1
            if self._depth == 0:
                self._end = self.position


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


def call_entry(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI writes it, with a new id."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
