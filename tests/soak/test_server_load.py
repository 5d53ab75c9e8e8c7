"""Sixty-four clients for five minutes: nothing lost, nothing mixed up, nothing leaked.

They ask for whole answers and streams, dense and sparse, one sample and several, in chats and in
sessions; they cancel, leave, read slowly. Every answer is compared with what its prompt gives
alone. QWEN1M_SOAK_SECONDS sets the time; on a slow machine it goes on until enough has happened.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from importlib.util import find_spec

import pytest

from qwen1m_ext.haystack import held_out_text

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(find_spec("openai") is None, reason="needs qwen1m_ext[test]"),
]

CLIENTS = 64
SECONDS = float(os.environ.get("QWEN1M_SOAK_SECONDS", "300"))
ENOUGH = 8
"""Of each kind of turn in each third, whatever the time."""

PATIENCE = 300.0
"""Seconds beyond its time after which a third is given up."""

SLACK_BYTES = 16 << 20
"""Memory that may come on top without being a leak: a leaked request or stream is some 20 KB."""

TOKENS = 24
KINDS = {"whole": 3, "streamed": 4, "chat": 2, "slow": 2, "session": 2, "cancelled": 2, "left": 3}
"""Turns of a client and how often they come."""

SESSIONS = threading.Semaphore(12)  # open at once; each holds pages
ARGUMENTS = ("--dtype", "float32", "--max-model-len", "32k", "--prefill-chunk-tokens", "4096",
             "--max-chunk-ms", "200", "--max-queue", "48", "--max-num-seqs", "32")  # fmt: skip


class Answers:
    """What prompts give alone, all different, so that a mixed-up stream cannot pass."""

    def __init__(self, client) -> None:
        rng = random.Random(0)
        sizes = [40] * 24 + [300] * 12 + [3000] * 6
        self.expected: dict[tuple, list[str]] = {}
        seen: set[str] = set()
        for number, size in enumerate(sizes):
            prompt = held_out_text(size, rng)
            attention = "sparse" if number % 3 == 0 else "dense"
            n = 3 if number % 5 == 0 else 1
            key = (prompt, attention, n)
            options = completion(key)
            texts = [c.text for c in client.completions.create(**options).choices]
            if not seen & set(texts) and all(len(text) == TOKENS for text in texts):
                seen.update(texts)
                self.expected[key] = texts
        self.keys = list(self.expected)
        self.follow_ups = {}  # of sessions: (prompt, text) -> the text after them
        for key in [key for key in self.keys if key[2] == 1][::2]:
            prompt, attention, _ = key
            whole = (prompt + self.expected[key][0] + " And then", attention, 1)
            choice = client.completions.create(**completion(whole)).choices[0]
            self.follow_ups[key] = choice.text
        self.chats = {}
        for key in self.keys[:12]:
            self.chats[key[0]] = chat(client, key[0]).choices[0].message.content
        assert len(self.keys) > 20 and len(set(self.follow_ups.values())) > 8


def completion(key: tuple) -> dict:
    """The request of a key; samples at a temperature where there are several."""
    prompt, attention, n = key
    return dict(
        model="demo_model", prompt=prompt, n=n, max_tokens=TOKENS, seed=5,
        temperature=0.8 if n > 1 else 0.0, extra_body={"attention": attention},
    )  # fmt: skip


def chat(client, prompt: str):
    messages = [{"role": "user", "content": prompt[:400]}]
    return client.chat.completions.create(
        model="demo_model", messages=messages, max_tokens=TOKENS, temperature=0
    )


class Worker(threading.Thread):
    """One client: a random mix of what clients do, every answer checked as far as it came."""

    def __init__(self, server, number: int, answers: Answers, is_over) -> None:
        super().__init__(daemon=True)
        self.server, self.number, self.answers, self.is_over = server, number, answers, is_over
        self.rng = random.Random(number)
        self.done: Counter[str] = Counter()
        self.turns = 0
        self.trouble: list[str] = []

    def run(self) -> None:
        import openai

        client = self.server.client()
        while not self.is_over() and not self.trouble:
            (what,) = self.rng.choices(list(KINDS), list(KINDS.values()))
            self.turns += 1
            try:
                getattr(self, what)(client)
                self.done[what] += 1
            except openai.RateLimitError as error:
                time.sleep(min(1.0, float(error.response.headers["Retry-After"])))
            except Exception as error:
                self.trouble.append(f"{what}: {error!r}")
        client.close()

    # --- turns ---

    def whole(self, client) -> None:
        key = self.rng.choice(self.answers.keys)
        choices = client.completions.create(**completion(key)).choices
        assert [choice.text for choice in choices] == self.answers.expected[key]

    def chat(self, client) -> None:
        prompt = self.rng.choice(list(self.answers.chats))
        answer = chat(client, prompt)
        assert answer.choices[0].message.content == self.answers.chats[prompt]

    def streamed(self, client) -> None:
        self.stream(client, self.rng.choice(self.answers.keys))

    def left(self, client) -> None:
        """Go away in the middle, perhaps before anything has come."""
        self.stream(client, self.rng.choice(self.answers.keys), leave=self.rng.randint(0, 40))

    def cancelled(self, client) -> None:
        self.stream(client, self.rng.choice(self.answers.keys), cancel=self.rng.randint(0, 3))

    def stream(self, client, key: tuple, leave: int = 1 << 30, cancel: int = -1) -> None:
        import openai

        mine = f"soak-{self.number}-{self.turns}-{time.monotonic_ns()}"
        texts = [""] * key[2]
        stream = client.completions.create(
            **completion(key), stream=True, extra_headers={"X-Request-Id": mine}
        )
        try:
            for count, chunk in enumerate(stream):
                assert chunk.id == mine, (chunk.id, mine)
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                if count >= leave:
                    return
                if count == cancel:
                    self.server.delete(f"/v1/requests/{mine}")
        except openai.APIError:
            assert cancel >= 0
        finally:
            stream.close()
            for text, expected in zip(texts, self.answers.expected[key], strict=True):
                assert expected.startswith(text), (key[0][-40:], text, expected)
        if cancel < 0:
            assert texts == self.answers.expected[key]

    def slow(self, client) -> None:
        """A reader with a small window who takes a pause after every few bytes; chunks are fat."""
        key = self.rng.choice([k for k in self.answers.keys if k[2] == 1])
        options = completion(key)
        body = options.pop("extra_body") | options | {"stream": True, "logprobs": 20}
        data = json.dumps(body).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.settimeout(PATIENCE)
            connection.connect(("127.0.0.1", self.server.port))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(data), data)
            )
            answer = b""
            while piece := connection.recv(2000):
                answer += piece
                time.sleep(0.02)
        head, _, stream = answer.partition(b"\r\n\r\n")
        if b" 429 " in head.split(b"\r\n")[0]:
            return
        # the chunks of the transfer encoding are those of the events, one each
        events = [line for line in stream.split(b"\r\n") if line.startswith(b"data: {")]
        text = "".join(
            choice["text"] for event in events for choice in json.loads(event[6:])["choices"]
        )
        assert text == self.answers.expected[key][0] and b"data: [DONE]" in stream

    def session(self, client) -> None:
        """A question and one that follows it, which finds the first one in the cache."""
        key = self.rng.choice(list(self.answers.follow_ups))
        prompt, attention, _ = key
        name = f"s-{self.number}-{self.turns}-{time.monotonic_ns()}"
        with SESSIONS:
            self.server.post("/v1/sessions", {"id": name})
            try:
                extra = {"session": name, "attention": attention}
                first = client.completions.create(**completion(key) | {"extra_body": extra})
                text = first.choices[0].text
                assert text == self.answers.expected[key][0]
                follow = completion((prompt + text + " And then", attention, 1))
                second = client.completions.create(**follow | {"extra_body": extra})
                assert second.choices[0].text == self.answers.follow_ups[key]
                if attention == "dense" and len(prompt) < 1000:  # attention's temperature is 1
                    cached = second.usage.prompt_tokens_details.cached_tokens
                    assert cached >= first.usage.total_tokens - 1, (cached, first.usage)
            finally:
                self.server.delete(f"/v1/sessions/{name}")


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_many_clients(tmp_path):
    from lib.server import ServerProcess, open_files, resident_bytes, wait_for

    with ServerProcess(tmp_path / "log", *ARGUMENTS) as server:
        alone = server.client()
        answers = Answers(alone)
        alone.close()

        def storm(seconds: float) -> dict[str, int]:
            end = time.monotonic() + seconds
            workers: list[Worker] = []

            def done() -> dict[str, int]:
                return {kind: sum(worker.done[kind] for worker in workers) for kind in KINDS}

            def is_over() -> bool:
                late = time.monotonic() - end
                return late > PATIENCE or (late > 0 and min(done().values()) >= ENOUGH)

            workers += [Worker(server, i, answers, is_over) for i in range(CLIENTS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(seconds + 2 * PATIENCE)
                assert not worker.is_alive(), "a client hangs"
            trouble = [text for worker in workers for text in worker.trouble]
            assert not trouble, (len(trouble), trouble[:5])
            server.idle()
            assert server.settled("qwen1m:kv_cache_pages_used", 0)
            assert server.get("/v1/sessions")["data"] == []
            assert min(done().values()) >= ENOUGH, done()
            return done()

        pids = (server.process.pid, server.engine_pid)

        def held() -> tuple[int, int]:
            return sum(map(open_files, pids)), sum(map(threads, pids))

        storm(SECONDS / 3)  # fills caches and pools; what comes after must not grow
        storm(SECONDS / 3)
        time.sleep(1.0)  # the last connections are cleared away
        files, tasks = held()
        memory = [resident_bytes(pid) for pid in pids]
        done = storm(SECONDS / 3)
        wait_for(lambda: held()[0] <= files + 4 and held()[1] <= tasks + 4)
        more_memory = [resident_bytes(pid) for pid in pids]
        for before, after in zip(memory, more_memory, strict=True):
            assert after <= before * 1.1 + SLACK_BYTES, (memory, more_memory)
        assert pids == (server.process.pid, server.engine_pid)
        assert server.metric("qwen1m:engine_restarts_total") == 0
        print(f"{done} in the last third; files, threads {files, tasks} then {held()}; "
              f"bytes {memory} then {more_memory}; "
              f"{server.metric('qwen1m:num_preemptions_total'):.0f} preemptions, "
              f"{server.metric('qwen1m:kv_cache_evictions_total'):.0f} evictions")  # fmt: skip
        assert server.process.poll() is None
        assert "Traceback" not in (tmp_path / "log").read_text()
