"""`qwen1m bench serve`: load on a running server of OpenAI's API, with streams timed by chunk.

TTFT is from sending a request to its first text, ITL between two chunks with text, TPOT the mean of
a request after its first token, E2EL the whole; throughputs are over the whole run.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import RequestError
from .summary import milliseconds

WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "that", "with", "on", "as", "by")


@dataclass
class ServeOptions:
    """What load to make."""

    url: str
    model: str | None
    num_prompts: int
    request_rate: float  # per second, with Poisson arrivals; inf: at once
    max_concurrency: int
    input_len: int  # tokens
    output_len: int  # tokens
    api_key: str | None = None
    seed: int = 0
    timeout: float = 3600.0  # seconds without a byte


@dataclass
class Timing:
    """One request as its client saw it; seconds from its start."""

    ttft: float | None = None
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


class _Server:
    def __init__(self, options: ServeOptions) -> None:
        parts = urllib.parse.urlsplit(options.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(f"--url: expected http(s)://host:port, got {options.url!r}")
        self._host, self._port, self._base = parts.hostname, parts.port, parts.path.rstrip("/")
        self._https, self._timeout = parts.scheme == "https", options.timeout
        self._headers = {"Content-Type": "application/json"}
        if options.api_key:
            self._headers["Authorization"] = f"Bearer {options.api_key}"

    def open(self, method: str, path: str, body: Any = None) -> tuple[Any, Any]:
        """(connection, response)."""
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        data = None if body is None else json.dumps(body)
        connection.request(method, self._base + path, data, self._headers)
        return connection, connection.getresponse()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """A whole JSON answer. Raises RequestError for an error status."""
        connection, response = self.open(method, path, body)
        text = response.read()
        connection.close()
        if response.status >= 400:
            raise RequestError(f"{path}: the server answers {response.status}: {text[:200]!r}")
        return json.loads(text)


def prompts_of(server: _Server, options: ServeOptions) -> list[list[int]]:
    """Random words as token ids of exactly the wanted length, each prompt another."""
    rng = random.Random(options.seed)
    prompts = []
    for _ in range(options.num_prompts):
        ids: list[int] = []
        while len(ids) < options.input_len:
            words = " ".join(rng.choices(WORDS, k=max(16, options.input_len // 2)))
            ids += server.json("POST", "/tokenize", {"prompt": words + " "})["tokens"]
        prompts.append(ids[: options.input_len])
    return prompts


def one_request(server: _Server, model: str, prompt: list[int], output_len: int) -> Timing:
    """Stream one completion and time its chunks."""
    timing = Timing()
    body = {
        "model": model, "prompt": prompt, "max_tokens": output_len, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    start = last = time.perf_counter()
    try:
        connection, response = server.open("POST", "/v1/completions", body)
        if response.status != 200:
            timing.error = f"{response.status}: {response.read()[:200]!r}"
            connection.close()
            return timing
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                timing.error = str(chunk["error"]["message"])
                break
            if chunk.get("choices"):
                if timing.ttft is None:
                    timing.ttft = now - start
                else:
                    timing.itl.append(now - last)
                last = now
            if chunk.get("usage"):
                timing.prompt_tokens = chunk["usage"]["prompt_tokens"]
                timing.output_tokens = chunk["usage"]["completion_tokens"]
        timing.latency = last - start
        connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        timing.error = repr(error)
    if timing.error is None and timing.ttft is None:
        timing.error = "the stream ended without a token"
    return timing


def summarise(timings: list[Timing], duration: float) -> dict[str, Any]:
    """VLLM's keys; latencies are of completed requests."""
    done = [t for t in timings if t.error is None]
    tokens_in, tokens_out = sum(t.prompt_tokens for t in done), sum(t.output_tokens for t in done)
    tpot = [
        (t.latency - t.ttft) / (t.output_tokens - 1)
        for t in done
        if t.ttft is not None and t.output_tokens > 1
    ]
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(timings) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        **milliseconds("ttft", [t.ttft for t in done if t.ttft is not None]),
        **milliseconds("tpot", tpot),
        **milliseconds("itl", [gap for t in done for gap in t.itl]),
        **milliseconds("e2el", [t.latency for t in done]),
    }


def bench_serve(options: ServeOptions) -> dict[str, Any]:
    """Run the load. Raises RequestError if the server cannot be asked at all."""
    server = _Server(options)
    try:
        model = options.model or server.json("GET", "/v1/models")["data"][0]["id"]
        prompts = prompts_of(server, options)
    except OSError as error:
        raise RequestError(f"--url {options.url}: no server answers: {error}") from None
    rng = random.Random(options.seed)
    timings: list[Timing] = []
    waiting: SimpleQueue[list[int]] = SimpleQueue()
    closed = threading.Event()

    def client() -> None:
        while True:
            try:
                prompt = waiting.get(timeout=0.01)
            except Empty:
                if closed.is_set():
                    return
                continue
            timings.append(one_request(server, model, prompt, options.output_len))

    count = min(options.max_concurrency, options.num_prompts)
    threads = [threading.Thread(target=client, daemon=True) for _ in range(count)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for prompt in prompts:
        waiting.put(prompt)
        if options.request_rate != float("inf"):
            time.sleep(rng.expovariate(options.request_rate))
    closed.set()
    for thread in threads:
        thread.join()
    result = summarise(timings, time.perf_counter() - start)
    errors = {t.error for t in timings if t.error}
    return {"model": model, "max_concurrency": count} | result | {"errors": sorted(errors)[:10]}
