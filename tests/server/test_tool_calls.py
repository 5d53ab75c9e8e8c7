"""The parser of tool calls: what is a call, what is text, and that pieces make no difference."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from qwen1m_ext import demo_model_path
from qwen1m_ext.events import OutputDelta
from qwen1m_ext.grammar import GrammarCompiler
from qwen1m_ext.request import RequestMetrics
from qwen1m_ext.server.chat_api import ChatShape
from qwen1m_ext.server.json_prefix import JsonObject
from qwen1m_ext.server.schemas import ChatBody
from qwen1m_ext.server.tool_calls import CLOSE, OPEN, Arguments, CallBegin, ToolCallParser
from qwen1m_ext.server.tools import Calling, calling
from qwen1m_ext.tokenizer import Tokenizer

NAMES = ("f", "g.h-1")


@dataclass(frozen=True)
class Call:
    """A call as its parts add up; `whole`: the parser counted it."""

    name: str
    arguments: str
    whole: bool = True


def parsed(*pieces: str) -> list[str | Call]:
    """What the parts add up to; the last piece is the end."""
    parser = ToolCallParser(NAMES)
    result: list[str | Call] = []
    for i, piece in enumerate(pieces):
        for part in parser.push(piece, i == len(pieces) - 1):
            last = result[-1] if result else None
            if isinstance(part, CallBegin):
                result.append(Call(part.name, ""))
            elif isinstance(part, Arguments):
                assert part.text and isinstance(last, Call)
                result[-1] = Call(last.name, last.arguments + part.text)
            elif isinstance(last, str):
                assert part
                result[-1] = last + part
            else:
                assert part
                result.append(part)
    # Arguments are JSON if, and only if, their call is complete.
    calls = [part for part in result if isinstance(part, Call)]
    whole = [is_object(call.arguments) for call in calls]
    assert sum(whole) == parser.calls
    marks = iter(whole)
    return [
        Call(part.name, part.arguments, next(marks)) if isinstance(part, Call) else part
        for part in result
    ]


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def written(name: str, arguments: object) -> str:
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments})}\n{CLOSE}"


F = Call("f", '{"a": 1}')
CALL = written("f", {"a": 1})
HEAD = f'{OPEN}\n{{"name": "f", "arguments": '
NAN, INFINITE = (CALL.replace("1", number) for number in ("NaN", "1e999"))
TRICKY = json.dumps({"x": '}"\\' + CLOSE + OPEN})


def broken(arguments: str) -> Call:
    return Call("f", arguments, whole=False)


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
        (written("f", json.loads(TRICKY)), [Call("f", TRICKY)]),
        (f'{HEAD}{{"x": "日本",\n "x": [-0.5e+7, {{}}] }} }}{CLOSE}',
         [Call("f", '{"x": "日本",\n "x": [-0.5e+7, {}] }')]),
        (INFINITE, [Call("f", '{"a": 1e999}')]),
        # Written otherwise.
        (f'{OPEN}{{"name": "g.h-1"}}{CLOSE}', [Call("g.h-1", "{}")]),
        (f'{OPEN}{{"arguments": {{"a":1}}, "name": "f"}} {CLOSE}', [F]),
        (CALL.replace('"f"', r'"\u0066"'), [F]),
        # Only the end of the wrapping is missing, or another call follows.
        (CALL[: -len(CLOSE)], [F]),
        (CALL[:-3], [F]),
        (CALL[: -len(CLOSE) - 2], [F]),
        (f'{OPEN}{{"name": "f"}}<', [Call("f", "{}")]),
        (f"{CALL[: -len(CLOSE)]}{CALL}", [F, F]),
        (f"{CALL[: -len(CLOSE)]}<tool_c", [F, "<tool_c"]),
        # Cut, or broken, within the arguments.
        (CALL[: -len(CLOSE) - 3], [broken('{"a": 1')]),
        (HEAD + "{", [broken("{")]),
        (f'{HEAD}{{"a": "x', [broken('{"a": "x')]),
        (NAN, [broken('{"a": '), "NaN}}\n" + CLOSE]),
        (f"{HEAD}{{'a'}}}}{CLOSE} x", [broken("{"), f"'a'}}}}{CLOSE} x"]),
        (f'{HEAD}{{"a": "\n"}}}}{CLOSE}', [broken('{"a": "'), f'\n"}}}}{CLOSE}']),
        (f'{HEAD}{{"a" {CALL}', [broken('{"a" '), F]),
        (f'{HEAD}{{"a": {"[" * 300}', [broken('{"a": ' + "[" * 254), "[" * 46]),
        # ... and behind them: the last brace has been kept.
        (f'{HEAD}{{}}, "x": 1}}{CLOSE}', [broken("{"), f'}}, "x": 1}}{CLOSE}']),
        (f"{HEAD}{{}}{CLOSE}", [broken("{"), f"}}{CLOSE}"]),
        (f"{HEAD}{{}}}} and{CLOSE}\n{CALL}", [broken("{"), f"}}}} and{CLOSE}", F]),
        # No calls.
        (OPEN, [OPEN]),
        (HEAD, [HEAD]),
        (f"{OPEN[:-1]} {CLOSE}", [f"{OPEN[:-1]} {CLOSE}"]),
        (written("unknown", {}), [written("unknown", {})]),
        (written("f", [1]), [written("f", [1])]),
        (written("f", "{}"), [written("f", "{}")]),
        (f"{OPEN}f(1){CLOSE} x", [f"{OPEN}f(1){CLOSE} x"]),
        (f'{OPEN}{{"name": "f", "x": 1}}{CLOSE}', [f'{OPEN}{{"name": "f", "x": 1}}{CLOSE}']),
        (f'{OPEN}{{"name": ["f"]}}{CLOSE}', [f'{OPEN}{{"name": ["f"]}}{CLOSE}']),
        (f'{OPEN}{{"name": "f"}} and{CLOSE}', [f'{OPEN}{{"name": "f"}} and{CLOSE}']),
        (f'{OPEN}{{"arguments": {{"a": 1e999}}, "name": "f"}}{CLOSE}',
         [f'{OPEN}{{"arguments": {{"a": 1e999}}, "name": "f"}}{CLOSE}']),
        # What is none does not spoil the next one.
        (f"{OPEN} {CALL}", [f"{OPEN} ", F]),
        (f"{OPEN}{{}}{CLOSE}\n{CALL}", [f"{OPEN}{{}}{CLOSE}", F]),
        (f"{OPEN}{{x {CALL}}}", [f"{OPEN}{{x", F, "}"]),
        (f"{OPEN}{'{' * 100_000}", [f"{OPEN}{'{' * 100_000}"]),
        (f"{OPEN}{'{' * 9999}{'}' * 9999}{CLOSE}", [f"{OPEN}{'{' * 9999}{'}' * 9999}{CLOSE}"]),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_calls_and_text(text, expected):
    assert parsed(text) == expected
    if len(text) < 1000:
        assert parsed(*text, "") == expected


def test_arguments_come_out_as_they_are_written():
    """All but their last brace; the call begins with the first."""
    parser = ToolCallParser(NAMES)
    assert not any(parser.push(character) for character in HEAD)
    assert parser.push("{") == [CallBegin("f"), Arguments("{")]
    for character in '"a": [1, {"b": "}"}]':
        assert parser.push(character) == [Arguments(character)]
    assert not any(parser.push(character) for character in "} }\n" + CLOSE[:-1])
    assert parser.calls == 0
    assert parser.push(">") == [Arguments("}")]
    assert parser.calls == 1


PIECES = st.sampled_from(
    [OPEN, CLOSE, "<tool", "_call>", "</", '{"name": "f"', ', "arguments": {', '"a": "', '"', "}",
     "}}", "\\", " ", "\n", "x", "<", ",", "1", "[", "]", CALL, HEAD, HEAD + '{"a": ',
     written("g.h-1", {}), written("no", {})]
)  # fmt: skip
ANSWERS = st.lists(PIECES, max_size=14).map("".join)


def cut(data: st.DataObject, text: str) -> list[str]:
    """A text in pieces, some of them empty."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(deadline=None, max_examples=400)
@given(text=ANSWERS, data=st.data())
def test_any_pieces_add_up_to_the_same(text, data):
    whole = parsed(text)
    assert parsed(*cut(data, text)) == whole
    assert parsed(*text, "") == whole
    # Nothing is lost but the wrapping of calls and white space beside them.
    rest = text
    for part in whole:
        if isinstance(part, str):
            assert rest.lstrip().startswith(part.lstrip())
            rest = rest[rest.index(part) + len(part) :]
            continue
        assert rest.lstrip().startswith(OPEN)
        rest = rest.lstrip()[len(OPEN) :].lstrip()
        head = re.match(r'{\s*"name"\s*:\s*"(.*?)"\s*,\s*"arguments"\s*:\s*(?={)', rest)
        if head is None:  # it came out as a whole
            value, end = json.JSONDecoder().raw_decode(rest)
            arguments = json.loads(part.arguments)
            assert (value["name"], value.get("arguments", {})) == (part.name, arguments)
            rest = rest[end:]
        else:
            assert head[1] == part.name
            rest = rest[head.end() :]
            assert rest.startswith(part.arguments)
            rest = rest[len(part.arguments) :]
            if part.whole and rest.lstrip():
                assert rest.lstrip()[0] == "}"
                rest = rest.lstrip()[1:]
        if part.whole:
            tag = re.match(r"\s*(</tool_call>)?", rest)
            rest = "" if CLOSE.startswith(rest.strip()) else rest[tag.end() :]
    assert not rest.strip()


class Chat:
    """A ChatShape without a server: the answer is given."""

    def __init__(self, pieces: list[str], stream: bool) -> None:
        tools = [{"type": "function", "function": {"name": name}} for name in NAMES]
        body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "stream": stream}
        service = SimpleNamespace(tokenizer=None, settings=SimpleNamespace(served_name="m"))
        generation = SimpleNamespace(request_id="r", created=0, usage=lambda: None)
        calling = Calling(frozenset(NAMES), None)
        self.shape = ChatShape(service, ChatBody.model_validate(body), generation, calling)
        self.events = [
            OutputDelta(
                0, [0], piece, RequestMetrics(),
                finish_reason="stop" if i == len(pieces) - 1 else None,
            )
            for i, piece in enumerate(pieces)
        ]  # fmt: skip

    def streamed(self) -> ChatCompletion:
        """As the official client puts it together."""
        state = ChatCompletionStreamState()
        for event in self.events:
            for choice in self.shape.render(0, event):
                state.handle_chunk(ChatCompletionChunk.model_validate(self.shape.chunk([choice])))
        return state.current_completion_snapshot

    def whole(self) -> ChatCompletion:
        for event in self.events:
            self.shape.collect(0, event)
        return ChatCompletion.model_validate(self.shape.whole())


@settings(deadline=None, max_examples=100)
@given(text=ANSWERS, data=st.data())
def test_the_client_puts_a_stream_together_as_the_whole_answer(text, data):
    (a,), (b,) = Chat(cut(data, text), True).streamed().choices, Chat([text], False).whole().choices
    assert (a.message.content or "") == (b.message.content or "")
    assert a.finish_reason == b.finish_reason
    x, y = ([call.function for call in m.message.tool_calls or ()] for m in (a, b))
    assert [(f.name, f.arguments) for f in x] == [(f.name, f.arguments) for f in y]
    complete = any(is_object(function.arguments) for function in y)
    assert b.finish_reason == ("tool_calls" if complete else "stop")


# --- the beginning of a JSON object ---------------------------------------------------------------


def begins(text: str) -> int:
    """Characters that are the beginning of an object."""
    scanner = JsonObject()
    return next((i for i, character in enumerate(text) if not scanner.push(character)), len(text))


LEAVES = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        120,
        0.5,
        -1.5e-7,
        1e22,
        "",
        "x",
        '"\\',
        "\n\x7f",
        "é\U0001f600",
        {},
        [],
    ]
)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["", "a", "}"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(value=JSON)
@pytest.mark.parametrize("style", [{}, {"ensure_ascii": False, "indent": 2}], ids=str)
def test_every_object_is_one_and_ends_with_its_last_brace(style, value):
    text = " " + json.dumps({"a": value, "b": "\u2028"}, **style)
    assert begins(text + "}") == len(text)
    scanner = JsonObject()
    for character in text:
        assert not scanner.done
        assert scanner.push(character)
    assert scanner.done and scanner.depth == 0


@settings(deadline=None, max_examples=200)
@given(
    text=st.lists(
        st.sampled_from(
            [*'{}[]:,"\\ \n0123.eE+-"x', '"a":', "true", "nul", "null", "\\u00e9", "\x01"]
        ),
        max_size=10,
    ).map(lambda pieces: "{" + "".join(pieces))
)
def test_what_json_reads_and_no_more(text):
    """An object that `json` reads is taken to its end; one that is taken whole, it reads."""
    taken = begins(text)
    scanner = JsonObject()
    for character in text[:taken]:
        scanner.push(character)
    try:
        value, end = json.JSONDecoder(parse_constant=_refuse).raw_decode(text)
    except ValueError:
        assert not scanner.done
    else:
        assert isinstance(value, dict) and scanner.done and taken == end


def _refuse(constant: str) -> None:
    raise ValueError(constant)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"a": 01}', 7), ('{"a": 1.}', 8), ('{"a": -}', 7), ('{"a": 1e}', 8), ('{"a": .5}', 6),
        ('{"a": 1.5.}', 9), ('{"a": +1}', 6), ('{"a": tru }', 9), ('{"a": NaN}', 6), ("{,", 1),
        ('{"a": 1,}', 8), ('{"a": [1,]}', 9), ('{"a": [}', 7), ('{"a" 1}', 5), ('{"a": 1]', 7),
        (r'{"\x', 3), (r'{"\u00g', 6), ('{"\t', 2), ("[", 0), ("{}{", 2), ("{a", 1), ("{}", 2),
        ('{"a": 1 2}', 8), ('{"a"}', 4), ('{"a"::', 5), ('{"a":,', 5),
    ],
)  # fmt: skip
def test_where_an_object_breaks(text, taken):
    assert begins(text) == taken


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
