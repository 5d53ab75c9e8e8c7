"""Is what has come so far the beginning of a JSON object? Asked after every character.

RFC 8259, as `json.loads` reads it, but without NaN and Infinity. An object of the same name twice,
numbers beyond float64 and halves of surrogate pairs are its reader's business, as there.
"""

from __future__ import annotations

MAX_DEPTH = 256
"""Of nested objects and arrays: readers give up somewhere (Python's at about a thousand)."""

_SPACE = frozenset(" \t\n\r")
_HEX = frozenset("0123456789abcdefABCDEF")
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}


def _digits(state: str) -> dict[str, str]:
    return dict.fromkeys("0123456789", state)


_EXPONENT = {"e": "e", "E": "e"}
_NUMBER = {  # what may follow in a number, by what was last
    "-": _digits("integer") | {"0": "zero"},
    "zero": {".": "point"} | _EXPONENT,
    "integer": _digits("integer") | {".": "point"} | _EXPONENT,
    "point": _digits("fraction"),
    "fraction": _digits("fraction") | _EXPONENT,
    "e": _digits("exponent") | {"+": "sign", "-": "sign"},
    "sign": _digits("exponent"),
    "exponent": _digits("exponent"),
}
_NUMBER_ENDS = frozenset({"zero", "integer", "fraction", "exponent"})


class JsonObject:
    """One object, white space before it included."""

    def __init__(self) -> None:
        self._closers = ""  # of what is open, the innermost last
        self._state = "object"
        self._is_key = False  # the string that is being read
        self._rest = ""  # of a literal or an escape: what has to come

    @property
    def depth(self) -> int:
        """Of objects and arrays that are open."""
        return len(self._closers)

    @property
    def done(self) -> bool:
        """The object is complete; nothing may follow."""
        return self._state == "done"

    def push(self, character: str) -> bool:
        """Take a character; False: no object goes on with it (and none may be pushed after it)."""
        state = self._state
        if state in _NUMBER:
            if (following := _NUMBER[state].get(character)) is not None:
                self._state = following
                return True
            if state not in _NUMBER_ENDS:
                return False
            state = self._state = "after value"
        if state == "string":
            return self._in_string(character)
        if state == "escape":
            self._state, self._rest = ("hex", "....") if character == "u" else ("string", "")
            return character in '"\\/bfnrtu'
        if state == "hex":
            self._rest = self._rest[1:]
            self._state = "hex" if self._rest else "string"
            return character in _HEX
        if state == "literal":
            fits = character == self._rest[0]
            self._rest = self._rest[1:]
            self._state = "literal" if self._rest else "after value"
            return fits
        if character in _SPACE:
            return state != "done"
        return self._token(state, character)

    def _in_string(self, character: str) -> bool:
        if character == '"':
            self._state = "colon" if self._is_key else "after value"
        elif character == "\\":
            self._state = "escape"
        return character >= " "

    def _token(self, state: str, character: str) -> bool:
        """The first character of something, between white space."""
        if state == "object":
            return character == "{" and self._open(character)
        if state == "colon":
            self._state = "value"
            return character == ":"
        if state in ("first key", "key") and character == '"':
            self._state, self._is_key = "string", True
            return True
        if character in "}]" and state in ("first key", "first value", "after value"):
            fits = self._closers.endswith(character)
            self._closers = self._closers[:-1]
            self._state = "after value" if self._closers else "done"
            return fits
        if state == "after value":
            self._state = "key" if self._closers.endswith("}") else "value"
            return character == ","
        return state in ("value", "first value") and self._value(character)

    def _value(self, character: str) -> bool:
        if character in "{[":
            return self._open(character)
        if character == '"':
            self._state, self._is_key = "string", False
        elif character in _LITERALS:
            self._state, self._rest = "literal", _LITERALS[character]
        elif character == "-":
            self._state = "-"
        else:
            self._state = _NUMBER["-"].get(character, "")
        return self._state != ""

    def _open(self, character: str) -> bool:
        self._closers += "}" if character == "{" else "]"
        self._state = "first key" if character == "{" else "first value"
        return len(self._closers) <= MAX_DEPTH
