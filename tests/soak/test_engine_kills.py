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

    from lib.server import ServerProcess, open_files, resident_bytes, wait_for

    rng = random.Random(0)
    prompts = [chr(65 + i) + " walked " * (1 if i % 3 else 1500) for i in range(CLIENTS)]
    arguments = ("--dtype", "float32", "--max-model-len", "64k", "--prefill-chunk-tokens", "1024")
    with ServerProcess(tmp_path / "log", *arguments) as server:
        alone = server.client()
        expected = [alone.completions.create(prompt=p, **OPTIONS).choices[0].text for p in prompts]
        before = open_files(server.process.pid)
        stop = threading.Event()
        killed_at = [0.0]
        done = [0] * CLIENTS
        errors: list[tuple[int | None, float]] = []  # status (None: in a stream), seconds after it
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
                    errors.append((status, time.monotonic() - killed_at[0]))
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
            wait_for(lambda goal=goal: trouble or all(map(int.__ge__, done, goal)), 120)
            assert not trouble, trouble[:3]
            time.sleep(rng.random())
            wait_for(lambda: len(running()) > CLIENTS // 2)
            with_it = running()
            pid, killed_at[0] = server.engine_pid, time.monotonic()
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda ids=with_it: not running() & ids, 5)
            wait_for(lambda: server.get("/health")["status"] == "ok", 60)
            memory.append(resident_bytes(server.process.pid))
        stop.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"
        assert not trouble, trouble[:3]
        assert server.metric("qwen1m:engine_restarts_total") == ROUNDS
        assert {status for status, _ in errors} == {None, 503}
        assert server.settled("qwen1m:num_requests_running", 0)
        assert server.settled("qwen1m:kv_cache_pages_used", 0)
        time.sleep(1.0)  # the last connections are cleared away
        assert open_files(server.process.pid) <= before + 4
        assert memory[-1] <= memory[1] * 1.1, memory
        print(f"{sum(done)} answers, {len(errors)} errors, {memory} bytes")
