"""The engine's process is killed again and again under load: nobody hangs, nothing is mixed up."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(find_spec("openai") is None, reason="needs qwen1m_ext[test]"),
]

ROUNDS, CLIENTS = 5, 12
OPTIONS = {"model": "demo_model", "temperature": 0, "max_tokens": 24}


def test_kills_under_load(tmp_path):
    import openai

    from lib.server import PATIENCE, ServerProcess, open_files, resident_bytes, wait_for

    rng = random.Random(0)
    prompts = [chr(65 + i) + " walked " * (1 if i % 3 else 1500) for i in range(CLIENTS)]
    arguments = ("--dtype", "float32", "--max-model-len", "64k", "--prefill-chunk-tokens", "1024")
    with ServerProcess(tmp_path / "log", *arguments, holdable=True) as server:
        alone = server.client()
        expected = [alone.completions.create(prompt=p, **OPTIONS).choices[0].text for p in prompts]
        before = open_files(server.process.pid)
        stop = threading.Event()
        done = [0] * CLIENTS
        errors: list[int | None] = []  # status; None: in a stream
        trouble: list[BaseException] = []

        def running() -> set[str]:
            return {entry["id"] for entry in server.get("/v1/requests")["data"]}

        def run(i: int) -> None:
            client = server.client()
            while not stop.is_set():
                text = ""
                try:
                    if i % 2:
                        text = client.completions.create(prompt=prompts[i], **OPTIONS)
                        text = text.choices[0].text
                    else:
                        for chunk in client.completions.create(
                            prompt=prompts[i], stream=True, **OPTIONS
                        ):
                            text += chunk.choices[0].text
                    assert text == expected[i]
                    done[i] += 1
                except openai.APIError as error:
                    status = getattr(error, "status_code", None)
                    errors.append(status)
                    if not expected[i].startswith(text) or status not in (None, 503):
                        trouble.append(error)
                    time.sleep(0.2)
                except BaseException as error:
                    trouble.append(error)
                    break
            client.close()

        threads = [threading.Thread(target=run, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        memory = []
        for _ in range(ROUNDS):
            goal = [count + 1 for count in done]
            wait_for(lambda goal=goal: trouble or all(map(int.__ge__, done, goal)))
            assert not trouble, trouble[:3]
            time.sleep(rng.random())
            with server.held(0):  # until every client waits, wherever it is
                wait_for(lambda: trouble or len(running()) == CLIENTS)
                with_it = running()
                os.kill(server.engine_pid, signal.SIGKILL)
            wait_for(lambda ids=with_it: not running() & ids)
            wait_for(lambda: server.get("/health")["status"] == "ok")
            memory.append(resident_bytes(server.process.pid))
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a client hangs"
        assert not trouble, trouble[:3]
        assert server.metric("qwen1m:engine_restarts_total") == ROUNDS
        assert set(errors) == {None, 503}
        server.idle()
        assert server.settled("qwen1m:kv_cache_pages_used", 0)
        wait_for(lambda: open_files(server.process.pid) <= before + 4)
        assert memory[-1] <= memory[1] * 1.1 + (16 << 20), memory
        print(f"{sum(done)} answers, {len(errors)} errors, {memory} bytes")
