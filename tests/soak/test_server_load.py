"""Sixty-four clients for two minutes, with cancels and disconnects: nothing lost, mixed or leaked.

QWEN1M_SOAK_SECONDS makes it longer.
"""

from __future__ import annotations

import os
import random
import threading
import time
from importlib.util import find_spec

import pytest

from qwen1m_ext.haystack import held_out_text

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(find_spec("openai") is None, reason="needs qwen1m_ext[test]"),
]

CLIENTS = 64
SECONDS = float(os.environ.get("QWEN1M_SOAK_SECONDS", "120"))
OPTIONS = dict(model="demo_model", temperature=0)


class Worker(threading.Thread):
    """One client: a random mix of what clients do, every finished answer checked."""

    def __init__(self, server, number, expected, end):
        super().__init__(daemon=True)
        self.server, self.expected, self.end = server, expected, end
        self.rng = random.Random(number)
        self.done = {"whole": 0, "streamed": 0, "cancelled": 0, "left": 0}
        self.trouble: list[str] = []

    def run(self):
        import openai

        client = self.server.client()
        while time.monotonic() < self.end and not self.trouble:
            prompt = self.rng.choice(list(self.expected))
            what = self.rng.choices(list(self.done), [3, 4, 1, 2])[0]
            try:
                self.turn(client, what, prompt)
                self.done[what] += 1
            except openai.RateLimitError as error:
                time.sleep(min(1.0, float(error.response.headers["Retry-After"])))
            except Exception as error:
                self.trouble.append(f"{what}: {error!r}")
        client.close()

    def turn(self, client, what, prompt):
        import openai

        options = OPTIONS | dict(prompt=prompt, max_tokens=len(self.expected[prompt]))
        if what == "whole":
            text = client.completions.create(**options).choices[0].text
            assert text == self.expected[prompt], (prompt[-40:], text)
            return
        stream = client.completions.create(**options, stream=True)
        text = ""
        try:
            for count, chunk in enumerate(stream):
                text += chunk.choices[0].text
                if what == "left" and count >= self.rng.randint(0, 8):
                    return
                if what == "cancelled" and count == 2:
                    self.server.delete(f"/v1/requests/{chunk.id}")
        except openai.APIError:
            assert what == "cancelled"
        finally:
            stream.close()
        assert self.expected[prompt].startswith(text), (prompt[-40:], text)
        if what == "streamed":
            assert text == self.expected[prompt]


def test_many_clients(tmp_path):
    from lib.server import ServerProcess, open_files, resident_bytes

    rng = random.Random(0)
    prompts = [held_out_text(size, rng) for size in [40] * 24 + [300] * 12 + [3000] * 4]
    arguments = ("--dtype", "float32", "--max-model-len", "128k", "--prefill-chunk-tokens", "1024",
                 "--max-queue", "48", "--max-num-seqs", "32")  # fmt: skip
    with ServerProcess(tmp_path / "log", *arguments) as server:
        alone = server.client()
        expected = {
            p: alone.completions.create(prompt=p, max_tokens=24, **OPTIONS).choices[0].text
            for p in prompts
        }
        expected = {prompt: text for prompt, text in expected.items() if len(text) == 24}
        assert len(expected) > 20

        def storm(seconds):
            end = time.monotonic() + seconds
            workers = [Worker(server, i, expected, end) for i in range(CLIENTS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(seconds + 120)
                assert not worker.is_alive(), "a client hangs"
            trouble = [text for worker in workers for text in worker.trouble]
            assert not trouble, trouble[:5]
            assert server.settled("qwen1m:num_requests_running", 0)
            assert server.settled("qwen1m:num_requests_waiting", 0)
            assert server.settled("qwen1m:kv_cache_pages_used", 0)
            time.sleep(1.0)  # the last connections are cleared away
            assert server.get("/v1/requests")["data"] == []
            pids = (server.process.pid, server.engine_pid)
            done = {k: sum(worker.done[k] for worker in workers) for k in workers[0].done}
            return done, sum(map(open_files, pids)), [resident_bytes(pid) for pid in pids]

        storm(SECONDS / 3)  # fills caches and pools; what comes after must not grow
        done, files, memory = storm(SECONDS / 3)
        assert min(done.values()) > 10, done
        done, more_files, more_memory = storm(SECONDS / 3)
        assert more_files <= files + 4
        for before, after in zip(memory, more_memory, strict=True):
            assert after <= before * 1.1, (memory, more_memory)
        print(f"{done} requests in the last third; {more_files} files, {more_memory} bytes")
        assert server.process.poll() is None
        assert "Traceback" not in (tmp_path / "log").read_text()
