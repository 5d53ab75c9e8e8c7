"""A minute of random load on one engine: what every request gives is what it gives alone."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch

from lib.checkpoints import write_checkpoint
from lib.hold import PATIENCE
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.engine import Engine
from qwen1m_ext.errors import RequestError

SECONDS = 60
CLIENTS = 12


def cases(rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share beginnings, shorter and longer than the trained 64 tokens."""
    books = [[rng.randrange(256) for _ in range(900)] for _ in range(3)]
    result = []
    for i in range(36):
        prompt = books[i % 3][: rng.choice([3, 40, 64, 130, 300, 420, 800])]
        if rng.random() < 0.5:
            prompt = [*prompt, *(rng.randrange(256) for _ in range(rng.randrange(1, 60)))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=i, n=rng.choice([1, 1, 3]),
            max_tokens=rng.choice([1, 5, 30, 120]), ignore_eos=rng.random() < 0.5,
            logprobs=rng.choice([None, 2]), prompt_logprobs=rng.choice([None, None, 0]),
        )  # fmt: skip
        result.append((prompt, params))
    return result


@pytest.mark.soak
def test_random_load(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, gain=2.0)
    torch.set_num_threads(1)
    rng = random.Random(7)
    work = cases(rng)
    alone = LLM(directory, max_model_len=1024, enable_prefix_caching=False)
    want = []
    for prompt, params in work:
        output = alone.generate({"prompt_token_ids": prompt}, params)[0]
        want.append([sample.token_ids for sample in output.outputs])
    engine = Engine(
        directory, max_model_len=1024, prefill_chunk_tokens=200, max_num_seqs=5,
        max_itl_ms=20.0, max_chunk_ms=30.0,
    )  # fmt: skip
    failures: list[str] = []
    deadline = time.monotonic() + SECONDS

    def client(number: int) -> None:
        mine = random.Random(number)
        while time.monotonic() < deadline and not failures:
            which = mine.randrange(len(work))
            prompt, params = work[which]
            handle = engine.submit(prompt, params, priority=mine.choice([0, 0, 1]))
            cancelled = mine.random() < 0.3
            if cancelled:
                time.sleep(mine.random() * 0.05)
                handle.cancel()
            got = [sample.token_ids for sample in handle.result().outputs]
            for tokens, expected in zip(got, want[which], strict=True):
                if tokens != (expected[: len(tokens)] if cancelled else expected):
                    failures.append(f"case {which}: {tokens} is not {expected}")

    def session_client() -> None:
        """Turns of a conversation, some cancelled, in a session that is opened again and again."""
        mine = random.Random(99)
        while time.monotonic() < deadline and not failures:
            session = engine.open_session()
            history = [mine.randrange(256) for _ in range(10)]
            for _ in range(4):
                params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
                handle = engine.submit(history, params, session=session)
                if mine.random() < 0.3:
                    handle.cancel()
                output = handle.result()
                history += [*output.outputs[0].token_ids, mine.randrange(256)]
            session.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    threads.append(threading.Thread(target=session_client))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + PATIENCE)
        assert not thread.is_alive(), "a stream hangs"
    assert not failures, failures[0]
    engine.shutdown()
    stats = engine.stats()
    assert stats.pages_used == 0 and stats.requests_running == stats.requests_waiting == 0
    assert stats.preemptions_total > 0 and stats.evictions_total > 0, stats
    with pytest.raises(RequestError, match="at least one token"):
        engine.submit([], SamplingParams())
