"""The long wait: progress, keep-alive, status, cancelling, going away, and coming back."""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error

import openai
import pytest

from lib.server import PATIENCE, ServerProcess, wait_for
from qwen1m_ext import LLM, SamplingParams, demo_model_path
from qwen1m_ext.haystack import held_out_text

MODEL = "demo_model"
LONG = 8_000  # tokens: eight chunks; tests hold them where they want to look


def long_prompt(seed: int, tokens: int = LONG) -> str:
    return held_out_text(tokens, random.Random(seed))


def raw_stream(server: ServerProcess, body: dict, headers: dict | None = None):
    """(connection, response) of a streaming request, without a client library."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({"model": MODEL, "stream": True, "temperature": 0} | body),
        {"Content-Type": "application/json"} | (headers or {}),
    )
    return connection, connection.getresponse()


def lines_until(response: http.client.HTTPResponse, words: str) -> list[str]:
    """What a stream says, up to a line with these words; without one the connection times out."""
    lines = []
    while not lines or words not in lines[-1]:
        line = response.readline().decode()
        assert line, f"the stream has ended without {words!r}"
        lines.append(line.removesuffix("\n"))
    return lines


def test_headers_at_once_then_comments_and_progress(server):
    body = {"prompt": long_prompt(1), "max_tokens": 2, "return_progress": True}
    lines = []
    with server.held(2048):
        connection, response = raw_stream(server, body)
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        request_id = response.headers["X-Request-Id"]
        lines += lines_until(response, "prompt_progress")
        lines += lines_until(response, ": keep-alive")  # progress is told five times a second
        server.hold(4096)
        lines += lines_until(response, "prompt_progress")
    lines += response.read().decode().splitlines()
    connection.close()
    assert lines[0] == f": {request_id}"  # before anything is computed
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    progress = [c["prompt_progress"] for c in chunks if "prompt_progress" in c]
    assert len(progress) >= 3
    dones = [p["done"] for p in progress]
    assert dones == sorted(dones) and dones[-1] == progress[-1]["total"]
    assert all(p["eta_ms"] >= 0 and p["cached"] == 0 for p in progress)
    assert progress[-1]["eta_ms"] == 0
    first_text = next(i for i, c in enumerate(chunks) if c["choices"])
    assert all("prompt_progress" not in c for c in chunks[first_text:])
    assert lines[-2] == "data: [DONE]"


def test_silence_is_broken_by_the_clock(server):
    """An engine that says nothing for long; proxies must see bytes all the same."""
    lines = []
    with server.held(0):
        connection, response = raw_stream(server, {"prompt": long_prompt(2), "max_tokens": 1})
        for _ in range(3):
            lines += lines_until(response, ": keep-alive")
    lines += response.read().decode().splitlines()
    connection.close()
    assert lines[-2] == "data: [DONE]"
    assert not any("prompt_progress" in line for line in lines)


def test_the_official_client_sees_progress(client):
    stream = client.completions.create(
        model=MODEL, prompt=long_prompt(3, 3000), max_tokens=1, stream=True,
        extra_body={"return_progress": True},
    )  # fmt: skip
    seen = [chunk.prompt_progress for chunk in stream if hasattr(chunk, "prompt_progress")]
    assert seen and seen[-1]["done"] == seen[-1]["total"]


def test_status_from_outside_and_cancel(server):
    prompt = long_prompt(4)
    with server.held(4096):
        connection, response = raw_stream(
            server, {"prompt": prompt, "max_tokens": 50}, {"X-Request-Id": "mine-1"}
        )
        assert response.headers["X-Request-Id"] == "mine-1"

        def far_enough():
            status = server.get("/v1/requests/mine-1")
            return status if status["done"] > 3000 else None

        status = wait_for(far_enough)
        assert status["state"] == "prefill" and status["eta_ms"] > 0
        assert 0 < status["done"] < status["total"] and status["output_tokens"] == 0
        assert "mine-1" in [entry["id"] for entry in server.get("/v1/requests")["data"]]
        raw, again = raw_stream(server, {"prompt": "x"}, {"X-Request-Id": "mine-1"})
        assert again.status == 409  # the id is taken
        raw.close()

        assert server.delete("/v1/requests/mine-1")["state"] == "cancelled"
        lines = response.read().decode().splitlines()
        connection.close()
    errors = [json.loads(line[6:]) for line in lines if line.startswith('data: {"error"')]
    assert [e["error"]["code"] for e in errors] == ["request_cancelled"]
    assert server.get("/v1/requests/mine-1")["state"] == "cancelled"  # remembered
    server.idle()

    # What was computed is not lost: an identical retry goes on where it was, to the same answer.
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    retry = server.post("/v1/completions", body)
    assert retry["usage"]["prompt_tokens_details"]["cached_tokens"] >= 2048
    llm = LLM(demo_model_path(), dtype="float32", max_model_len=9000)
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=1)
    alone = llm.generate(prompt, params)[0].outputs[0]
    assert retry["choices"][0]["text"] == alone.text
    rows = zip(alone.token_ids, alone.logprobs, strict=True)
    expected = [row[token].logprob for token, row in rows]
    assert retry["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_unknown_requests(server):
    for method in ("GET", "DELETE"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.request(method, "/v1/requests/nobody")
        assert caught.value.code == 404


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels(server, stream):
    server.idle()
    before = server.metric("qwen1m:request_success_total")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    body = {"model": MODEL, "prompt": long_prompt(5 + stream), "max_tokens": 500, "stream": stream}
    headers = {"Content-Type": "application/json", "X-Request-Id": f"gone-{stream}"}
    with server.held(2048):
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        wait_for(lambda: any(r["done"] > 0 for r in server.get("/v1/requests")["data"]))
        connection.sock.close()
        connection.close()
        wait_for(lambda: server.get(f"/v1/requests/gone-{stream}")["state"] == "cancelled")
        server.idle()
    assert server.settled("qwen1m:kv_cache_pages_used", 0)
    assert server.metric("qwen1m:request_success_total") == before + 1


def test_closing_the_official_stream_cancels(server, client):
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Go on."}], max_tokens=5000,
        stream=True, extra_body={"ignore_eos": True},
    )  # fmt: skip
    for _ in range(5):
        last = next(stream)
    stream.close()
    wait_for(lambda: server.get(f"/v1/requests/{last.id}")["state"] == "cancelled")
    server.idle()


def test_short_requests_pass_a_long_one(server, client):
    with server.held(2048):  # "The river" waits with the long one, and is behind it
        connection, response = raw_stream(
            server, {"prompt": long_prompt(8, 30_000), "max_tokens": 1}, {"X-Request-Id": "long"}
        )
        wait_for(lambda: server.get("/v1/requests/long")["done"] > 0)
        stream = client.completions.create(
            model=MODEL, prompt="The river", max_tokens=4, temperature=0, stream=True
        )
        server.hold(20_000)
        assert len("".join(chunk.choices[0].text for chunk in stream)) == 4
        assert server.get("/v1/requests/long")["state"] == "prefill"  # still
        server.delete("/v1/requests/long")
        response.read()
    connection.close()


def test_sixteen_clients_at_once_get_what_they_get_alone(server, client):
    """A storm with cancels in between: no stream is mixed up or lost, nothing leaks."""
    prompts = [f"{name} went to the " for name in "ABCDEFGHIJKLMNOP"]
    options = dict(model=MODEL, max_tokens=24, temperature=0)
    alone = [client.completions.create(prompt=p, **options).choices[0].text for p in prompts]
    results: dict[tuple[int, int], str] = {}
    trouble = []

    def run(worker: int) -> None:
        own = server.client()
        try:
            for turn in range(3):
                if (worker + turn) % 5 == 0:  # goes away after a few tokens
                    stream = own.completions.create(prompt=prompts[worker], stream=True, **options)
                    next(iter(stream))
                    stream.close()
                elif worker % 2:
                    answer = own.completions.create(prompt=prompts[worker], **options)
                    results[worker, turn] = answer.choices[0].text
                else:
                    chunks = own.completions.create(prompt=prompts[worker], stream=True, **options)
                    results[worker, turn] = "".join(c.choices[0].text for c in chunks)
        except Exception as error:
            trouble.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not trouble
    assert len(results) == sum((w + t) % 5 != 0 for w in range(16) for t in range(3))
    for (worker, _), text in results.items():
        assert text == alone[worker]
    assert server.settled("qwen1m:num_requests_running", 0)
    assert server.settled("qwen1m:kv_cache_pages_used", 0)


def test_metrics_have_the_names_that_dashboards_read(server):
    text = server.get("/metrics")
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "prompt_tokens_total", "generation_tokens_total", "num_preemptions_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket", "request_success_total", "prefix_cache_hits_total",
        "prefill_progress_ratio", "prefill_eta_seconds",
    ):  # fmt: skip
        assert f"\nqwen1m:{name}" in text, name
    assert server.metric("process_open_fds") > 3


def test_a_pin_keeps_pages_until_it_is_undone(server, client):
    answer = client.completions.create(
        model=MODEL, prompt=long_prompt(9, 1000), max_tokens=1, extra_body={"pin": True}
    )
    assert server.settled("qwen1m:kv_cache_pages_pinned", 1000 // 128)
    assert server.delete(f"/v1/requests/{answer.id}/pin")["unpinned"]
    assert server.metric("qwen1m:kv_cache_pages_pinned") == 0
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.delete(f"/v1/requests/{answer.id}/pin")
    assert caught.value.code == 404
    with pytest.raises(openai.BadRequestError, match="single prompt"):
        client.completions.create(model=MODEL, prompt=["a", "b"], extra_body={"pin": True})


def test_priority_and_cancel_of_a_batch(server, client):
    server.post("/v1/sessions", {"id": "one"})
    with pytest.raises(openai.BadRequestError, match="single prompt"):
        client.completions.create(
            model=MODEL, prompt=["a", "b"], max_tokens=1, extra_body={"session": "one"}
        )
    server.delete("/v1/sessions/one")
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], max_tokens=1, extra_body={"priority": -3, "pin": False}
    )
    assert len(answer.choices) == 2
