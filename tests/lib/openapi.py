"""Requests that an OpenAPI document allows, and ones that are a little beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_ONE_OF_MANY = st.integers(0, 24)
"""One value of so many is of no kind that the document names."""

WORDS = st.sampled_from(["a", "f", "{}", '{"a": 1}', "<tool_call>", "\x00", "\ud800", "Füße", ""])

_LEAVES = {
    "number": st.floats(-2, 2) | st.floats(allow_nan=False, allow_infinity=False),
    "string": WORDS | st.text(max_size=20),
    "boolean": st.booleans(),
    "null": st.none(),
}
PATH_PARTS = WORDS | st.text(max_size=40) | st.just("../a")

Draw = Callable[[Any], Any]
Operation = tuple[str, str, Mapping[str, Any] | None]
"""(method, path, schema of the body)."""


def operations(document: Mapping[str, Any]) -> list[Operation]:
    """All of a document."""
    found = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            found.append((method.upper(), path, body.get("schema")))
    return found


def value(
    draw: Draw, schema: Mapping[str, Any], document: Mapping[str, Any], depth: int = 0
) -> Any:
    """A value of a schema, sometimes another."""
    if draw(_ONE_OF_MANY) == 0:
        return draw(ANYTHING)
    if "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].split("/")[1:]:
            target = target[part]
        return value(draw, target, document, depth)
    if "anyOf" in schema:
        return value(draw, draw(st.sampled_from(schema["anyOf"])), document, depth)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    kind = schema.get("type")
    if kind == "integer":
        low, high = int(schema.get("minimum", -(1 << 63))), int(schema.get("maximum", 1 << 63))
        narrow = draw(st.booleans()) and low <= 12
        return draw(st.integers(max(low, -2), min(high, 12)) if narrow else st.integers(low, high))
    if kind == "array":
        low, high = schema.get("minItems", 0), min(schema.get("maxItems", 4), 4)
        count = draw(st.integers(low, high))
        return [value(draw, schema["items"], document, depth + 1) for _ in range(count)]
    if kind == "object" and "properties" in schema:
        names = sorted(schema["properties"])
        some = draw(st.lists(st.sampled_from(names), max_size=4 if depth == 0 else len(names)))
        chosen = sorted({*schema.get("required", ()), *some})
        return {n: value(draw, schema["properties"][n], document, depth + 1) for n in chosen}
    return draw(_LEAVES.get(kind, ANYTHING))


@st.composite
def requests(draw: Any, document: Mapping[str, Any]) -> tuple[str, str, Any]:
    """(method, path, body) of a document."""
    method, path, schema = draw(st.sampled_from(operations(document)))
    while "{" in path:
        before, _, rest = path.partition("{")
        name = draw(PATH_PARTS)
        path = before + quote(name, safe="", errors="surrogatepass") + rest.partition("}")[2]
    body = None if schema is None else value(draw, schema, document)
    return method, path, body
