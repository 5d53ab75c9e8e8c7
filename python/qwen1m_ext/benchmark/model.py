"""`qwen1m bench prefill` and `decode`: the engine in this process, by length and by batch."""

from __future__ import annotations

import random
import time
from typing import Any

from ..engine import Engine
from ..handle import RequestHandle
from ..memory import peak_bytes
from ..request import SamplingParams


def _prompt(engine: Engine, rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(engine.config.vocab_size) for _ in range(tokens)]


def _run(engine: Engine, prompts: list[list[int]], output_len: int) -> list[RequestHandle]:
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    handles = [engine.submit(prompt, params) for prompt in prompts]
    for handle in handles:
        handle.wait()
    return handles


def bench_prefill(
    engine: Engine, lengths: list[int], repeats: int, seed: int = 0
) -> dict[str, Any]:
    """Seconds from a prompt to its first token; every prompt is new, so no cache helps."""
    rng = random.Random(seed)
    _run(engine, [_prompt(engine, rng, min(lengths))], 1)  # warms up
    rows = []
    for length in lengths:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            _run(engine, [_prompt(engine, rng, length)], 1)
            seconds.append(time.perf_counter() - start)
        best = min(seconds)
        rows.append(
            {
                "input_len": length,
                "ttft_ms": 1000 * best,
                "input_throughput": length / best,
                "peak_mib": peak_bytes() / 2**20,
                "all_ttft_ms": [1000 * value for value in seconds],
            }
        )
    return {"rows": rows}


def bench_decode(
    engine: Engine, length: int, batches: list[int], output_len: int, seed: int = 0
) -> dict[str, Any]:
    """Time per output token after prompts of `length` tokens, several requests at once."""
    rng = random.Random(seed)
    rows = []
    for batch in batches:
        handles = _run(engine, [_prompt(engine, rng, length) for _ in range(batch)], output_len)
        metrics = [handle.result().metrics for handle in handles]
        # From the moment the last one has begun to decode, all of them do.
        tpot = [m.decode_seconds / (m.output_tokens - 1) for m in metrics]
        median = sorted(tpot)[len(tpot) // 2]
        rows.append(
            {
                "input_len": length,
                "batch": batch,
                "median_tpot_ms": 1000 * median,
                "output_throughput": batch / median,
            }
        )
    return {"rows": rows}
