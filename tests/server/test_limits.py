"""Keys, sizes, queues, and the end: what the server refuses, and how it stops."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import urllib.error

import openai
import pytest

from lib.server import PATIENCE, ServerProcess, wait_for
from qwen1m_ext import demo_model_path

SMALL = ("--max-model-len", "4096", "--prefill-chunk-tokens", "512")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A server with a key, one sequence at a time, and a queue of two."""
    log = tmp_path_factory.mktemp("small") / "log"
    arguments = (*SMALL, "--max-num-seqs", "1", "--max-queue", "2")
    with ServerProcess(log, *arguments, key="s3cret", holdable=True) as process:
        yield process


def test_a_key_is_asked_for(small):
    assert small.client().models.list().data
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"},
                    {"Authorization": "Bearer s3cre\xfc"}):  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=PATIENCE)
        for path in ("/v1/models", "/v1/sessions", "/v1/requests", "/openapi.json", "/nowhere"):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            error = json.loads(response.read())["error"]
            assert (response.status, error["code"]) == (401, "invalid_api_key")
        for path in ("/health", "/ready", "/metrics", "/"):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, path
        connection.close()
    assert "s3cret" not in small.log.read_text()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(server, chunked):
    body = json.dumps({"prompt": "x" * 3_000_000}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    with contextlib.suppress(OSError):  # the server answers before all is sent
        connection.request(
            "POST", "/v1/completions", pieces if chunked else body,
            {"Content-Type": "application/json"}, encode_chunked=chunked,
        )  # fmt: skip
    try:
        response = connection.getresponse()
    except OSError:
        return  # the answer was lost with the connection; the server goes on, see below
    finally:
        assert server.get("/health")["status"] == "ok"
    assert response.status == 413 and b"2000000" in response.read()
    connection.close()


def test_a_full_queue_is_refused_with_a_time(small):
    client = small.client()
    options = dict(model="demo_model", max_tokens=3000, extra_body={"ignore_eos": True})
    with small.held(0):
        streams = []
        for i in range(3):  # one runs, two wait
            streams.append(client.completions.create(prompt=f"{i}", stream=True, **options))
            assert small.settled("qwen1m:num_requests_running", 1)
        assert small.settled("qwen1m:num_requests_waiting", 2)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(prompt="more", **options)
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
        for stream in streams:
            stream.close()
        small.idle()
    assert client.completions.create(model="demo_model", prompt="x", max_tokens=1).choices


def is_draining(server: ServerProcess) -> bool:
    try:
        server.get("/ready")
    except urllib.error.HTTPError as error:
        assert error.code == 503 and error.headers["Retry-After"]
        return True
    return False


def test_a_draining_server_finishes_what_it_has_begun(tmp_path):
    with ServerProcess(tmp_path / "log", *SMALL, holdable=True) as server:
        client = server.client()
        with server.held(0):
            stream = client.completions.create(
                model="demo_model", prompt="x", max_tokens=400, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: is_draining(server))
            assert server.get("/health")["status"] == "draining"
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                client.completions.create(model="demo_model", prompt="x", max_tokens=1)
        chunks = list(stream)
        assert sum(len(c.choices) for c in chunks) >= 400
        assert chunks[-1].choices[0].finish_reason == "length"
        client.close()
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "how", ["second signal", pytest.param("time is up", marks=pytest.mark.soak)]
)
def test_draining_can_be_cut_short(tmp_path, how):
    seconds = "600" if how == "second signal" else "0.5"
    arguments = (*SMALL, "--drain-seconds", seconds)
    with ServerProcess(tmp_path / "log", *arguments, holdable=True) as server, server.held(0):
        stream = server.client().completions.create(model="demo_model", prompt="x", stream=True)
        server.process.send_signal(signal.SIGTERM)
        if how == "second signal":
            wait_for(lambda: is_draining(server))
            server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError):  # the stream says that it was cancelled
            list(stream)
        assert server.process.wait(PATIENCE) == 0


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    (tmp_path / "config.json").write_bytes((demo_model_path() / "config.json").read_bytes())
    run = subprocess.run(
        [sys.executable, "-m", "qwen1m_ext", "serve", "--model", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 2 and "tokenizer.json: file not found" in run.stderr
    assert "Traceback" not in run.stderr


def test_slow_readers_do_not_hold_up_others(server, client):
    """A client that never reads its stream: the kernel's buffers fill, the others go on."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    body = {"prompt": "x", "max_tokens": 3000, "stream": True, "ignore_eos": True, "logprobs": 5}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    done = threading.Event()

    def others() -> None:
        for _ in range(5):
            client.completions.create(model="demo_model", prompt="The river", max_tokens=8)
        done.set()

    threading.Thread(target=others, daemon=True).start()
    assert done.wait(PATIENCE)
    connection.close()
    server.idle()


def test_a_port_that_is_taken(server):
    run = subprocess.run(
        [sys.executable, "-m", "qwen1m_ext", "serve", "--port", str(server.port)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 2 and f"cannot listen on 127.0.0.1:{server.port}" in run.stderr
