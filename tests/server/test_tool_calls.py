"""The parser of tool calls: what is a call, what is text, and that pieces make no difference."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen1m_ext import demo_model_path
from qwen1m_ext.grammar import GrammarCompiler
from qwen1m_ext.server.schemas import ChatBody
from qwen1m_ext.server.tool_calls import CLOSE, OPEN, ToolCall, ToolCallParser
from qwen1m_ext.server.tools import calling
from qwen1m_ext.tokenizer import Tokenizer

NAMES = ("f", "g.h-1")


def parsed(*pieces: str) -> list[str | ToolCall]:
    """All parts, neighbouring texts joined; the last piece is the end."""
    parser = ToolCallParser(NAMES)
    parts: list[str | ToolCall] = []
    for i, piece in enumerate(pieces):
        for part in parser.push(piece, i == len(pieces) - 1):
            assert part != ""
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
    return parts


def written(name: str, arguments: object) -> str:
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments})}\n{CLOSE}"


F = ToolCall("f", '{"a": 1}')
CALL = written("f", {"a": 1})
NAN, INFINITE = (CALL.replace("1", number) for number in ("NaN", "1e999"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello.", ["Hello."]),
        ("  Hello. \n", ["  Hello. \n"]),
        (CALL, [F]),
        (f"\n{CALL}\n", [F]),
        (f"Let me see.\n\n{CALL}", ["Let me see.", F]),
        (f"{CALL}\n{CALL}", [F, F]),
        (f"a{CALL} b {CALL}c", ["a", F, " b", F, "c"]),
        (f'{OPEN}{{"name": "g.h-1"}}{CLOSE}', [ToolCall("g.h-1", "{}")]),
        (f'{OPEN}{{"arguments": {{}}, "name": "f"}} {CLOSE}', [ToolCall("f", "{}")]),
        (written("f", {"x": '}"\\' + CLOSE + OPEN}),
         [ToolCall("f", json.dumps({"x": '}"\\' + CLOSE + OPEN}))]),
        (written("f", {"x": "日本"}), [ToolCall("f", '{"x": "日本"}')]),
        # Only the closing tag is missing.
        (CALL[: -len(CLOSE)], [F]),
        (CALL[:-3], [F]),
        # No calls.
        (CALL[: -len(CLOSE) - 3], [CALL[: -len(CLOSE) - 3]]),
        (OPEN, [OPEN]),
        (f"{OPEN[:-1]} {CLOSE}", [f"{OPEN[:-1]} {CLOSE}"]),
        (written("unknown", {}), [written("unknown", {})]),
        (written("f", [1]), [written("f", [1])]),
        (written("f", "{}"), [written("f", "{}")]),
        (f"{OPEN}f(1){CLOSE} x", [f"{OPEN}f(1){CLOSE} x"]),
        (f'{OPEN}{{"name": "f", "x": 1}}{CLOSE}', [f'{OPEN}{{"name": "f", "x": 1}}{CLOSE}']),
        (f'{OPEN}{{"name": ["f"]}}{CLOSE}', [f'{OPEN}{{"name": ["f"]}}{CLOSE}']),
        (f'{OPEN}{{"name": "f"}} and{CLOSE}', [f'{OPEN}{{"name": "f"}} and{CLOSE}']),
        (NAN, [NAN]),
        (INFINITE, [INFINITE]),
        # What is none does not spoil the next one.
        (f"{OPEN} {CALL}", [f"{OPEN} ", F]),
        (f"{OPEN}{{}}{CLOSE}\n{CALL}", [f"{OPEN}{{}}{CLOSE}", F]),
        (f"{CALL[: -len(CLOSE)]}{CALL}", [CALL[: -len(CLOSE) - 1], F]),
        (f"{OPEN}{'{' * 100_000}", [f"{OPEN}{'{' * 100_000}"]),
        (f"{OPEN}{'{' * 9999}{'}' * 9999}{CLOSE}", [f"{OPEN}{'{' * 9999}{'}' * 9999}{CLOSE}"]),
    ],
    ids=range(30),
)  # fmt: skip
def test_calls_and_text(text, expected):
    assert parsed(text) == expected
    if len(text) < 1000:
        assert parsed(*text, "") == expected


PIECES = st.sampled_from(
    [OPEN, CLOSE, "<tool", "_call>", "</", '{"name": "f"', ', "arguments": {', '"a": "', '"', "}",
     "}}", "\\", " ", "\n", "x", "<", CALL, written("g.h-1", {}), written("no", {})]
)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(text=st.lists(PIECES, max_size=14).map("".join), data=st.data())
def test_any_pieces_add_up_to_the_same(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parsed(text)
    assert parsed(*pieces) == whole
    assert parsed(*text, "") == whole
    # Nothing is lost but white space beside calls.
    rest = text
    for part in whole:
        if isinstance(part, str):
            assert rest.lstrip().startswith(part.lstrip())
            rest = rest[rest.index(part) + len(part) :]
        else:
            assert rest.lstrip().startswith(OPEN)
            rest = rest.lstrip()[len(OPEN) :].lstrip()
            value, end = json.JSONDecoder().raw_decode(rest)
            assert (value["name"], value.get("arguments", {})) == (
                part.name,
                json.loads(part.arguments),
            )
            rest = rest[end:].lstrip()
            rest = rest[len(CLOSE) :] if rest.startswith(CLOSE) else ""
    assert not rest.strip()


# --- the grammar of tool_choice -------------------------------------------------------------------


@pytest.fixture(params=["bytes", "tokens"])
def tokenizer(request, tmp_path) -> Tokenizer:
    """The demo model's, and one that has tokens for the tags as Qwen2.5's has."""
    written = json.loads((demo_model_path() / "tokenizer.json").read_text())
    if request.param == "tokens":
        for number, tag in enumerate((OPEN, CLOSE), 259):
            written["added_tokens"].append(
                written["added_tokens"][0] | {"id": number, "content": tag, "special": False}
            )
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    return Tokenizer(tmp_path)


def follows(tokenizer: Tokenizer, options: dict, text: str) -> int | None:
    """Where a text leaves the grammar of a request; None: nowhere, and it may end there."""
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}},
                                            "required": ["a"]}}  # fmt: skip
    function |= options.pop("function", {})
    tools = [{"type": "function", "function": function}]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, **options}
    grammar = calling(ChatBody.model_validate(body), tokenizer, None).grammar
    assert grammar is not None
    eos = 258
    mask = GrammarCompiler(tokenizer, 272, [eos]).lark(grammar)(0)
    output: list[int] = []
    for token in [*tokenizer.encode(text), eos]:
        if mask(output, torch.zeros(272))[token] != 0:
            return len(tokenizer.decode(output, False))
        output.append(token)
    return None


NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("options", "text", "end"),
    [
        ({"tool_choice": "required"}, CALL, None),
        ({"tool_choice": "required"}, f"{CALL}\n{CALL}", None),
        ({"tool_choice": "required", "parallel_tool_calls": False}, f"{CALL}\n", len(CALL)),
        ({"tool_choice": NAMED}, CALL, None),
        ({"tool_choice": NAMED}, f"{CALL}\n{CALL}", len(CALL)),
        ({"tool_choice": NAMED}, "Hello", 0),
        ({"tool_choice": NAMED}, written("f", {"a": 1.5}), CALL.index("1") + 1),
        ({"tool_choice": "none"}, "a < b <tool_ call", None),
        ({"tool_choice": "none"}, f"No. {OPEN}", None),  # the place depends on the tokens
        ({"function": {"strict": True}}, "Hello\nthere", None),
        ({"function": {"strict": True}}, f"Well,\n{CALL}\n{CALL}", None),
        ({"function": {"strict": True}}, f"Well,\n{OPEN}\nx", len(f"Well,\n{OPEN}\n")),
        ({"function": {"strict": True}}, CALL, None),
        ({"parallel_tool_calls": False}, f"Well,\n{CALL}", None),
        ({"parallel_tool_calls": False}, f"Well,\n{CALL}\n", len(f"Well,\n{CALL}")),
    ],
    ids=range(15),
)  # fmt: skip
def test_what_a_grammar_lets_through(tokenizer, options, text, end):
    found = follows(tokenizer, dict(options), text)
    if options == {"tool_choice": "none"} and OPEN in text:
        assert found is not None
    else:
        assert found == end
