"""Sixty-four clients for two minutes, with cancels and disconnects: nothing lost, mixed or leaked.

QWEN1M_SOAK_SECONDS makes it longer; on a slow machine it goes on until enough has happened.
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
ENOUGH = 10
"""Of each kind of request in each third, whatever the time."""

SLACK_BYTES = 16 << 20
"""Memory that may come on top without being a leak: a leaked request or stream is some 20 KB."""

OPTIONS = dict(model="demo_model", temperature=0)


class Worker(threading.Thread):
    """One client: a random mix of what clients do, every finished answer checked."""

    def __init__(self, server, number, expected, is_over):
        super().__init__(daemon=True)
        self.server, self.expected, self.is_over = server, expected, is_over
        self.rng = random.Random(number)
        self.done = {"whole": 0, "streamed": 0, "cancelled": 0, "left": 0}
        self.trouble: list[str] = []

    def run(self):
        import openai

        client = self.server.client()
        while not self.is_over() and not self.trouble:
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
    from lib.server import PATIENCE, ServerProcess, open_files, resident_bytes, wait_for

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
            workers = []

            def done():
                return {k: sum(worker.done[k] for worker in workers) for k in workers[0].done}

            def is_over():
                late = time.monotonic() - end
                return late > PATIENCE or (late > 0 and min(done().values()) >= ENOUGH)

            workers += [Worker(server, i, expected, is_over) for i in range(CLIENTS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(seconds + 2 * PATIENCE)
                assert not worker.is_alive(), "a client hangs"
            trouble = [text for worker in workers for text in worker.trouble]
            assert not trouble, trouble[:5]
            server.idle()
            assert server.settled("qwen1m:kv_cache_pages_used", 0)
            assert min(done().values()) >= ENOUGH, done()
            return done()

        pids = (server.process.pid, server.engine_pid)
        storm(SECONDS / 3)  # fills caches and pools; what comes after must not grow
        storm(SECONDS / 3)
        time.sleep(1.0)  # the last connections are cleared away
        files, memory = sum(map(open_files, pids)), [resident_bytes(pid) for pid in pids]
        done = storm(SECONDS / 3)
        wait_for(lambda: sum(map(open_files, pids)) <= files + 4)
        more_memory = [resident_bytes(pid) for pid in pids]
        for before, after in zip(memory, more_memory, strict=True):
            assert after <= before * 1.1 + SLACK_BYTES, (memory, more_memory)
        print(f"{done} requests in the last third; {files} files, {memory}, {more_memory} bytes")
        assert server.process.poll() is None
        assert "Traceback" not in (tmp_path / "log").read_text()
