"""Tools through the official client. The demo model has never seen one: grammars make it call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import openai
import pytest

from lib.server import ServerProcess
from qwen1m_ext import demo_model_path
from qwen1m_ext.errors import RequestError
from qwen1m_ext.server.schemas import ChatMessage
from qwen1m_ext.server.tools import template_messages
from qwen1m_ext.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parents[1] / "fixtures" / "tools" / "chat_template.jinja"


def function(name: str, properties: dict | None, **more: object) -> dict:
    """A tool; all its properties are required."""
    entry = {"name": name, **more}
    if properties is not None:
        entry["parameters"] = {
            "type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False,
        }  # fmt: skip
    return {"type": "function", "function": entry}


UNIT = {"enum": ["metre", "mile"]}
DISTANCE = function("distance", {"to": {"type": "string", "maxLength": 8}, "unit": UNIT})
ROLL = function("roll", {"sides": {"type": "integer", "minimum": 2, "maximum": 99}})
NOW = function("now", None, description="The time")
ASK = [{"role": "user", "content": "How far is the sea?"}]
NAMED = {"type": "function", "function": {"name": "distance"}}
OPTIONS = dict(model="tools", messages=ASK, max_tokens=400, temperature=1.0, tools=[DISTANCE, ROLL])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The demo model with a template that knows tools, and tokens for the tags."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tools"
    shutil.copytree(demo_model_path(), directory)
    shutil.copy(TEMPLATE, directory)
    return directory


@pytest.fixture(scope="module")
def tools_server(checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ("--model", str(checkpoint), "--dtype", "float32", "--max-model-len", "16k")
    with ServerProcess(log, *arguments) as server:
        yield server


@pytest.fixture(scope="module")
def caller(tools_server):
    return tools_server.client()


def check(call, allowed=("distance", "roll")) -> dict:
    """The arguments of a call that follows its schema."""
    assert call.type == "function" and call.id.startswith("call_") and call.function.name in allowed
    arguments = json.loads(call.function.arguments)
    if call.function.name == "distance":
        assert set(arguments) == {"to", "unit"} and arguments["unit"] in UNIT["enum"]
    elif call.function.name == "roll":
        assert 2 <= arguments["sides"] <= 99
    else:
        assert arguments == {}
    return arguments


def gathered(chunks, n: int = 1) -> list[tuple[str, list[dict], str | None]]:
    """(content, calls, finish reason) of each sample of a stream, put together as clients do."""
    samples: list = [["", [], None] for _ in range(n)]
    for chunk in chunks:
        for choice in chunk.choices:
            sample = samples[choice.index]
            sample[0] += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                if part.index == len(sample[1]):
                    assert part.type == "function" and part.function.arguments == ""
                    name = part.function.name
                    sample[1].append({"id": part.id, "name": name, "arguments": "", "pieces": 0})
                else:
                    assert part.id is part.type is part.function.name is None
                    assert part.index == len(sample[1]) - 1 and part.function.arguments
                    sample[1][-1]["arguments"] += part.function.arguments
                    sample[1][-1]["pieces"] += 1
            assert sample[2] is None
            sample[2] = choice.finish_reason
    return [tuple(sample) for sample in samples]


def test_a_named_function_is_called_once(caller):
    choice = {"type": "function", "function": {"name": "roll"}}
    answer = caller.chat.completions.create(**OPTIONS, tool_choice=choice, seed=1, n=3)
    for sample in answer.choices:
        assert sample.finish_reason == "tool_calls" and sample.message.content is None
        (call,) = sample.message.tool_calls
        check(call, ["roll"])
    assert len({call.message.tool_calls[0].id for call in answer.choices}) == 3
    assert len({call.message.tool_calls[0].function.arguments for call in answer.choices}) > 1


@pytest.mark.parametrize("more", [{"logit_bias": {"258": 100}}, {"max_tokens": 300}], ids=str)
def test_required_calls_stream_as_they_are(caller, more):
    """The model ends as soon as it may, or calls until it is cut."""
    options = OPTIONS | dict(tool_choice="required", seed=2, n=4) | more
    whole = caller.chat.completions.create(**options)
    streamed = gathered(caller.chat.completions.create(**options, stream=True), 4)
    counts = []
    for sample, (content, calls, reason) in zip(whole.choices, streamed, strict=True):
        made = sample.message.tool_calls or []
        for call in made[:-1] if reason == "length" else made:
            check(call)
        # A token is a byte here; what comes at once is the first brace, and the last with the tag.
        assert all(call["pieces"] == len(call["arguments"]) for call in calls)
        assert reason == sample.finish_reason and content == (sample.message.content or "")
        assert [(c["name"], c["arguments"]) for c in calls] == [
            (c.function.name, c.function.arguments) for c in made
        ]
        counts.append(len(calls))
    reasons = {reason for *_, reason in streamed}
    if "logit_bias" in more:
        assert counts == [1] * 4 and reasons == {"tool_calls"}
        assert not any(content for content, *_ in streamed)
    else:
        assert max(counts) > 1 and "length" in reasons


def test_one_call_where_several_are_not_wanted(caller):
    answer = caller.chat.completions.create(
        **OPTIONS | dict(tools=[NOW]), tool_choice="required", parallel_tool_calls=False, n=3
    )
    for sample in answer.choices:
        (call,) = sample.message.tool_calls
        check(call, ["now"])


def test_a_call_that_is_cut(caller):
    """Before its arguments begin it is text, then a call whose arguments end where they end."""
    options = OPTIONS | dict(tool_choice="required", temperature=0, max_tokens=30)
    whole = caller.chat.completions.create(**options).choices[0]
    assert whole.message.tool_calls is None and whole.finish_reason == "length"
    assert whole.message.content.startswith('<tool_call>\n{"name": "')
    ((content, calls, reason),) = gathered(caller.chat.completions.create(**options, stream=True))
    assert (content, calls, reason) == (whole.message.content, [], "length")
    options |= dict(tool_choice=NAMED, max_tokens=60)
    whole = caller.chat.completions.create(**options).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "length" and whole.message.content is None
    assert call.function.name == "distance" and call.function.arguments.startswith("{")
    assert not call.function.arguments.endswith("}")
    ((content, calls, reason),) = gathered(caller.chat.completions.create(**options, stream=True))
    assert (content, reason) == ("", "length")
    assert calls[0]["arguments"] == call.function.arguments


def test_the_client_tells_arguments_as_they_come(caller):
    """Its own reader of streams."""
    tools = [DISTANCE | {"function": DISTANCE["function"] | {"strict": True}}]
    options = OPTIONS | dict(tools=tools, tool_choice="required", parallel_tool_calls=False, seed=5)
    events = []
    with caller.chat.completions.stream(**options) as stream:
        events = list(stream)
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls
    assert check(call) == call.function.parsed_arguments
    grown = [e.arguments for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(grown) > 20 and grown[-1] == call.function.arguments
    assert all(a.startswith(b) for a, b in zip(grown[1:], grown, strict=False))
    (done,) = (e for e in events if e.type == "tool_calls.function.arguments.done")
    assert (done.name, done.arguments) == ("distance", call.function.arguments)


def test_a_free_answer_is_text_as_without_parser(caller):
    options = OPTIONS | dict(temperature=0, max_tokens=40, logprobs=True)
    answer = caller.chat.completions.create(**options)
    free = answer.choices[0]
    none = caller.chat.completions.create(**options, tool_choice="none").choices[0]
    assert free.message.tool_calls is None and free.message.content == none.message.content != ""
    assert len(free.logprobs.content) == answer.usage.completion_tokens
    chunks = list(caller.chat.completions.create(**options, stream=True))
    ((content, calls, _),) = gathered(chunks)
    assert content == free.message.content and not calls
    entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert entries == free.logprobs.content


def test_with_a_response_format_an_answer_is_a_document_or_calls(caller):
    schema = {"type": "object", "properties": {"x": UNIT}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    options = OPTIONS | dict(response_format=form, seed=1, n=8, temperature=2.0)
    for sample in caller.chat.completions.create(**options).choices:
        if sample.finish_reason == "tool_calls":
            assert all(map(check, sample.message.tool_calls))
        elif sample.finish_reason == "stop":
            assert json.loads(sample.message.content)["x"] in UNIT["enum"]
    none = caller.chat.completions.create(**options, tool_choice="none")
    for sample in none.choices:
        assert sample.message.tool_calls is None
        assert sample.finish_reason == "length" or json.loads(sample.message.content)


def test_a_conversation_with_results(caller, tools_server, checkpoint):
    """What came out goes in again; the results stand in the order of the calls."""
    answer = caller.chat.completions.create(**OPTIONS, tool_choice=NAMED, seed=3)
    message = answer.choices[0].message
    call = message.tool_calls[0]
    other = {"id": "b", "type": "function", "function": {"name": "now", "arguments": " {} "}}
    assistant = message.model_dump(exclude_none=True)
    assistant["tool_calls"].append(other)
    messages = [
        *ASK, assistant,
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
        {"role": "tool", "tool_call_id": call.id, "content": "far"},
    ]  # fmt: skip
    arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
    tokens = tools_server.post("/tokenize", {"messages": messages, "tools": [NOW]})["tokens"]
    assert Tokenizer(checkpoint).decode(tokens, False) == (
        "<|im_start|>system\n# Tools\n\n<tools>\n"
        '{"type": "function", "function": {"name": "now", "description": "The time"}}\n'
        "</tools>\n\nA call:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nHow far is the sea?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        f'{{"name": "distance", "arguments": {arguments}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nfar\n</tool_response>\n"
        "<tool_response>\nnoon\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    answer = caller.chat.completions.create(**OPTIONS | dict(messages=messages, max_tokens=4))
    assert answer.usage.completion_tokens == 4


def test_results_go_on_in_a_session(tools_server, caller):
    tools_server.post("/v1/sessions", {"id": "talk"})
    extra = {"extra_body": {"session": "talk"}}
    choice = {"type": "function", "function": {"name": "roll"}}
    first = caller.chat.completions.create(**OPTIONS, tool_choice=choice, **extra)
    (call,) = first.choices[0].message.tool_calls
    extra["extra_body"]["continue_session"] = True
    result = {"role": "tool", "tool_call_id": call.id, "content": "five"}
    second = caller.chat.completions.create(
        **OPTIONS | dict(messages=[result], max_tokens=4), **extra
    )
    details = second.usage.prompt_tokens_details
    assert details.cached_tokens > first.usage.prompt_tokens
    turn = "<|im_end|>\n<|im_start|>user\n<tool_response>\nfive\n</tool_response><|im_end|>\n"
    assert second.usage.prompt_tokens - first.usage.total_tokens <= len(turn) + 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(tools=[ROLL, ROLL]), ["tools", "different"]),
        (dict(tools=[], tool_choice="required"), ["tool_choice", "tools"]),
        (dict(tool_choice={"type": "function", "function": {"name": "x"}}), ["'x'", "distance"]),
        (dict(tools=[function("two words", {})]), ["tools", "two words"]),
        (dict(tools=[{"type": "retrieval"}]), ["tools"]),
        (dict(tools=[function("f", {"x": {"type": "strin"}})], tool_choice="required"), ["tools"]),
        (dict(tool_choice="required", extra_body={"ignore_eos": True}), ["ignore_eos"]),
        (dict(messages=[*ASK, {"role": "tool", "content": "x"}]), ["tool_call_id"]),
        (dict(messages=[*ASK, {"role": "tool", "content": "x", "tool_call_id": "a"}]),
         ["messages[1]", "'a'"]),
        (dict(messages=[*ASK, {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "roll", "arguments": "[1]"}}]}]),
         ["messages[1].tool_calls[0].function.arguments", "[1]"]),
        (dict(messages=[{"role": "user", "content": "x", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]),
         ["tool_calls", "assistant"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_request_names_what_is_wrong(caller, change, words):
    with pytest.raises(openai.BadRequestError) as caught:
        caller.chat.completions.create(**OPTIONS | change)
    for word in words:
        assert word in caught.value.body["message"], caught.value.body


def test_a_template_that_knows_no_tools(client):
    """The demo model's own."""
    options = OPTIONS | dict(model="demo_model")
    with pytest.raises(openai.BadRequestError, match="tools: .*template does not know them"):
        client.chat.completions.create(**options)
    called = {"role": "assistant", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="tools: .*template does not know them"):
        client.chat.completions.create(**options | dict(messages=[*ASK, called], tools=[]))


def test_the_order_of_results():
    def message(**entries: object) -> ChatMessage:
        return ChatMessage.model_validate(entries)

    first = message(role="tool", content="1", tool_call_id="unknown")  # the session knows it
    assert template_messages([first]) == [{"role": "tool", "content": "1"}]
    with pytest.raises(RequestError, match=r"messages\[1\].tool_call_id: .*there are none"):
        template_messages([message(role="assistant", content="x"), first])
