"""Sessions over HTTP: open, use, save, restart, load, refuse."""

from __future__ import annotations

import random
import urllib.error

import pytest

from lib.server import ARGUMENTS, ServerProcess
from qwen1m_ext.haystack import held_out_text

TEXT = held_out_text(5000, random.Random(11))  # beyond the trained 2,048 tokens


def complete(server, prompt, session, **options):
    body = {"prompt": prompt, "session": session, "max_tokens": 12, "temperature": 0} | options
    answer = server.post("/v1/completions", body)
    usage = answer["usage"]
    return answer["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"], usage


def refused(server, method, path, body=None):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.request(method, path, body)
    return caught.value.code, caught.value.read().decode()


def test_a_session_survives_a_restart(server, session_dir, tmp_path):
    opened = server.post("/v1/sessions", {"id": "book", "freeze_temperature": True})
    assert opened["num_tokens"] == 0 and opened["freeze_temperature"]
    text, cached, usage = complete(server, TEXT, "book")
    assert cached == 0
    frozen = usage["attention_temperature"]
    assert frozen > 1
    follow = TEXT + text + " And then"
    second, cached, usage = complete(server, follow, "book")
    assert cached >= len(TEXT) and usage["attention_temperature"] == frozen
    described = server.get("/v1/sessions/book")
    assert described["num_tokens"] > len(follow) and described["temperature"] == frozen

    info = server.post("/v1/sessions/book/save")
    assert info["num_tokens"] == described["num_tokens"]
    assert (session_dir / "book.q1ms").stat().st_size == info["file_bytes"]
    listed = server.get("/v1/sessions")
    assert [entry["id"] for entry in listed["data"]] == ["book"]
    assert [entry["id"] for entry in listed["saved"]] == ["book"]
    third = follow + second + "!"
    expected, cached, _ = complete(server, third, "book")

    code, words = refused(server, "POST", "/v1/sessions/book/load")
    assert code == 409 and "already open" in words
    assert server.delete("/v1/sessions/book")["closed"]
    assert server.settled("qwen1m:kv_cache_pages_used", 0)
    code, _ = refused(server, "GET", "/v1/sessions/book")
    assert code == 404

    with ServerProcess(tmp_path / "log", *ARGUMENTS, "--session-dir", str(session_dir)) as again:
        loaded = again.post("/v1/sessions/book/load")
        assert loaded["num_tokens"] == info["num_tokens"]
        assert complete(again, third, "book")[:2] == (expected, cached)

    assert server.delete("/v1/sessions/book/saved")["deleted"]
    assert server.get("/v1/sessions")["saved"] == []


def test_damaged_files_are_refused_and_listed(server, session_dir):
    (session_dir / "broken.q1ms").write_bytes(b"no session")
    try:
        code, words = refused(server, "POST", "/v1/sessions/broken/load")
        assert code == 409 and "not a session file" in words and "broken" in words
        (listed,) = server.get("/v1/sessions")["saved"]
        assert "broken" in listed["error"]
    finally:
        (session_dir / "broken.q1ms").unlink()


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("POST", "/v1/sessions", {"id": "../x"}, 400),
        ("POST", "/v1/sessions", {}, 400),
        ("POST", "/v1/sessions", {"id": "x", "frozen": True}, 400),
        ("GET", "/v1/sessions/none", None, 404),
        ("DELETE", "/v1/sessions/none", None, 404),
        ("POST", "/v1/sessions/none/save", {}, 404),
        ("POST", "/v1/sessions/none/load", {}, 404),
        ("POST", "/v1/sessions/..%2Fx/load", {}, 404),
        ("DELETE", "/v1/sessions/none/saved", None, 404),
    ],
)
def test_what_is_not_there(server, method, path, body, code):
    got, words = refused(server, method, path, body)
    assert got == code and '"error"' in words


def test_a_session_in_use_is_neither_saved_nor_closed(server, client):
    server.post("/v1/sessions", {"id": "busy"})
    with server.held(0):
        stream = client.completions.create(
            model="demo_model", prompt="On and on", stream=True, extra_body={"session": "busy"}
        )
        assert server.get("/v1/sessions/busy")["requests"] == 1
        for method, path in (("POST", "/v1/sessions/busy/save"), ("DELETE", "/v1/sessions/busy")):
            code, words = refused(server, method, path, {} if method == "POST" else None)
            assert code == 409 and "in use" in words
        stream.close()
    server.idle()
    assert server.delete("/v1/sessions/busy")["closed"]


def test_an_empty_session_is_not_saved(server):
    server.post("/v1/sessions", {"id": "empty"})
    code, words = refused(server, "POST", "/v1/sessions/empty/save", {})
    assert code == 400 and "none yet" in words
    server.delete("/v1/sessions/empty")


def test_new_messages_follow_what_a_session_holds(server, client):
    """`continue_session`: the same tokens as the whole conversation, without sending it again."""
    server.post("/v1/sessions", {"id": "talk", "freeze_temperature": True})
    first = {"role": "user", "content": held_out_text(1500, random.Random(3))}
    options = dict(model="demo_model", max_tokens=10, temperature=0)
    answer = client.chat.completions.create(
        messages=[first], **options, extra_body={"session": "talk", "ignore_eos": True}
    )
    held = server.get("/v1/sessions/talk")["num_tokens"]
    second = {"role": "user", "content": "And then?"}
    extra = {"session": "talk", "continue_session": True}
    more = client.chat.completions.create(messages=[second], **options, extra_body=extra)
    assert more.usage.prompt_tokens_details.cached_tokens >= held - 1
    answer_text = answer.choices[0].message.content
    whole = [first, {"role": "assistant", "content": answer_text}, second]
    tokens = server.post("/tokenize", {"messages": whole})["count"]
    assert more.usage.prompt_tokens == tokens
    server.delete("/v1/sessions/talk")
    code, words = refused(
        server, "POST", "/v1/chat/completions", {"messages": [second], "continue_session": True}
    )
    assert code == 400 and "continue_session" in words


def test_an_answer_cut_by_max_tokens_is_whole_in_a_loaded_session(server, client):
    """Its last token was drawn and never computed; it is in the file all the same."""
    server.post("/v1/sessions", {"id": "cut"})
    options = dict(model="demo_model", max_tokens=5, temperature=0)
    talk = dict(messages=[{"role": "user", "content": "Tell me."}], **options)
    client.chat.completions.create(**talk, extra_body={"session": "cut", "ignore_eos": True})
    server.post("/v1/sessions/cut/save")
    more = dict(messages=[{"role": "user", "content": "More."}], **options)
    extra = {"session": "cut", "continue_session": True}
    expected = client.chat.completions.create(**more, extra_body=extra)
    server.delete("/v1/sessions/cut")
    server.post("/v1/sessions/cut/load")
    again = client.chat.completions.create(**more, extra_body=extra)
    assert again.usage == expected.usage
    assert again.choices[0].message.content == expected.choices[0].message.content
    server.delete("/v1/sessions/cut")
    server.delete("/v1/sessions/cut/saved")
