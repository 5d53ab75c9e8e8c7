"""Bodies of any kind: an answer or a 4xx that says why, never a 5xx, never silence."""

from __future__ import annotations

import http.client
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.openapi import ANYTHING as VALUES
from lib.openapi import requests
from lib.server import PATIENCE, ServerProcess

EXAMPLES = int(os.environ.get("QWEN1M_FUZZ_EXAMPLES", "1000"))  # of each long test
FIELDS = [
    "model", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "presence_penalty",
    "frequency_penalty", "logit_bias", "response_format", "stream", "stream_options", "top_k",
    "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "session", "pin",
    "skip_special_tokens", "include_stop_str_in_output", "priority", "return_progress", "user",
    "messages", "prompt", "echo", "logprobs", "top_logprobs", "best_of", "tools", "metadata",
    "tool_choice", "tokens", "id", "freeze_temperature", "max_completion_tokens", "store",
]  # fmt: skip
GOOD = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [65, 66]},
}
LIKELY = {  # values near the edge of what is allowed
    "n": st.integers(-1, 4),
    "max_tokens": st.integers(-1, 12) | st.sampled_from([1 << 40, 1 << 63, 65536]),
    "temperature": st.floats(-1, 3) | st.sampled_from([0, 1e-30, 1e6, 1e300]),
    "top_p": st.floats(0, 1.2),
    "top_k": st.integers(-3, 300),
    "seed": st.integers(-(1 << 64), 1 << 64),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "logit_bias": st.dictionaries(st.integers(-2, 300).map(str), st.floats(-200, 200), max_size=3),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "prompt": st.text(max_size=30) | st.lists(st.integers(-1, 280), max_size=9)
    | st.lists(st.lists(st.integers(0, 271), max_size=4), max_size=3),
    "stop_token_ids": st.lists(st.integers(-1, 280), max_size=3),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}])
    | st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries(
        {"name": st.just("x"), "schema": st.dictionaries(
            st.sampled_from(["type", "enum", "properties", "pattern", "$ref"]), VALUES)})}),
}  # fmt: skip


@st.composite
def bodies(draw):
    path = draw(st.sampled_from(sorted(GOOD)))
    body = dict(GOOD[path])
    for field in draw(st.lists(st.sampled_from(FIELDS), max_size=4)):
        kinds = [VALUES, LIKELY[field]] if field in LIKELY else [VALUES]
        body[field] = draw(st.one_of(*kinds))
    if draw(st.booleans()):
        body["stream"] = draw(st.booleans())
    return path, json.dumps(body).encode()


def post(server, path, body, headers, method="POST") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, text


def check(status: int, text: bytes) -> None:
    assert status < 500, text
    if status >= 400:
        error = json.loads(text)["error"]
        assert error["message"] and error["type"]
    elif text.startswith(b": "):  # a stream ends properly, and not in an error of the server
        assert text.endswith(b"data: [DONE]\n\n")
        assert b'"server_error"' not in text


@settings(max_examples=80)
@given(case=bodies())
def test_any_fields(server, case):
    path, body = case
    check(*post(server, path, body, {"Content-Type": "application/json"}))


@settings(max_examples=40)
@given(body=st.binary(max_size=200) | VALUES.map(lambda v: json.dumps(v).encode()),
       kind=st.sampled_from(["application/json", "text/plain", ""]),
       path=st.sampled_from([*sorted(GOOD), "/v1/sessions"]))  # fmt: skip
def test_any_bytes(server, body, kind, path):
    status, text = post(server, path, body, {"Content-Type": kind} if kind else {})
    check(status, text)
    assert status != 200


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"prompt": ' + b'{"a":' * 50_000,
        *(
            b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": '
            + b'{"properties": {"a": ' * depth
            + b"{}"
            + b"}}" * depth
            + b"}}}"
            for depth in (150, 300, 450)
        ),
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a", "prompt": 1}',
        b'{"prompt": [1' + b",1" * 300_000 + b"]}",
        b"",
        b"null",
    ],
    ids=range(16),
)
def test_bodies_that_break_parsers(server, body):
    status, text = post(server, "/v1/completions", body, {"Content-Type": "application/json"})
    check(status, text)
    assert 400 <= status < 500
    assert server.get("/health")["status"] == "ok"


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "HEAD", "OPTIONS", "BREW"])
def test_other_methods(server, method):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request(method, "/v1/chat/completions")
    response = connection.getresponse()
    text = response.read()
    assert response.status == 405
    if text:
        assert json.loads(text)["error"]["message"]
    connection.close()


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """A server of its own: sessions are opened, saved and deleted."""
    directory = tmp_path_factory.mktemp("lonely")
    arguments = ("--dtype", "float32", "--max-model-len", "4k", "--session-dir", str(directory))
    with ServerProcess(directory / "log", *arguments) as server:
        yield server, server.get("/openapi.json")


def send(server, request: tuple) -> None:
    method, path, body = request
    if isinstance(body, dict) and "completions" in path:
        body = {"max_tokens": 3} | body
        for name in ("max_tokens", "max_completion_tokens"):  # long answers are no trouble
            if isinstance(body.get(name), int) and 64 < body[name] < 4096:
                body[name] = 64
    data = None if body is None else json.dumps(body).encode()
    status, text = post(server, path, data, {"Content-Type": "application/json"}, method)
    if status != 200 or text[:1] not in b"<q#":  # the page, the metrics
        check(status, text)


@settings(max_examples=60)
@given(data=st.data())
def test_what_the_openapi_document_names(lonely, data):
    server, document = lonely
    send(server, data.draw(requests(document)))


@pytest.mark.soak
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_what_the_openapi_document_names_for_long(lonely, data):
    server, document = lonely
    send(server, data.draw(requests(document)))


@pytest.mark.soak
@settings(max_examples=EXAMPLES)
@given(case=bodies())
def test_any_fields_for_long(server, case):
    path, body = case
    check(*post(server, path, body, {"Content-Type": "application/json"}))
