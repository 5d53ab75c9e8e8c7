"""Short requests and a running answer while a long prompt is prefilled, under three policies.

    python bench/fairness_cpu.py [--tokens 131072] [--shorts 8] [--gap 1] [--answer 2000]
        [--max-itl-ms 250]

The same load in one process on the demo model: an answer that streams, a long prompt, and short
requests that arrive during its prefill. "fair" caps steps by the cost model; "whole chunks" is
continuous batching without a cap; "one at a time" serves in order of arrival. Times are from
submission. Writes bench/results/cpu/fairness.json.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from typing import Any

import torch
from paired import environment, write

from qwen1m_ext import SamplingParams, demo_model_path
from qwen1m_ext.engine import Engine
from qwen1m_ext.events import Event, Finished, OutputDelta

SHORT_TOKENS, SHORT_OUTPUT = 256, 8


class Client:
    """A request and when its tokens came."""

    def __init__(self, engine: Engine, prompt: list[int], max_tokens: int) -> None:
        self.times: list[float] = []
        self.start = time.perf_counter()
        self.end = self.start
        self.first = threading.Event()
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.handle = engine.submit(prompt, params, on_event=self.take)

    def take(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, OutputDelta):
            self.times.append(now)
            self.first.set()
        elif isinstance(event, Finished):
            self.end = now

    @property
    def first_token(self) -> float:
        """Seconds from submission to the first token."""
        return self.times[0] - self.start

    @property
    def whole(self) -> float:
        """Seconds from submission to the end."""
        return self.end - self.start


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }


def warm_up(engine: Engine) -> None:
    """Thread pools, code, and something for the cost model to go by."""
    for i, length in enumerate((256, 2048, 8192)):
        prompt = tokens(length, 900 + i)
        engine.submit(prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)).result()


def measure(policy: str, options: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Run the load under one policy."""
    options["attention"] = "dense"  # a sparse window is one step: no latency cap cuts it
    engine = Engine(demo_model_path(), max_model_len=args.tokens + 65536, **options)
    warm_up(engine)
    answer = Client(engine, tokens(64, 1), args.answer)
    answer.first.wait()
    long = Client(engine, tokens(args.tokens, 2), 1)
    shorts = []
    for i in range(args.shorts):
        time.sleep(args.gap)
        shorts.append(Client(engine, tokens(SHORT_TOKENS, 10 + i), SHORT_OUTPUT))
    for client in (answer, long, *shorts):
        client.handle.wait()
    during = [
        b - a
        for a, b in zip(answer.times, answer.times[1:], strict=False)
        if b > long.start and a < long.end
    ]
    row = {
        "policy": policy,
        "options": options,
        "long_prefill_s": long.whole,
        "short_first_token_s": spread([c.first_token for c in shorts]),
        "short_whole_s": spread([c.whole for c in shorts]),
        "shorts_done_before_long": sum(c.end < long.end for c in shorts),
        "answer_tokens_during_prefill": len(during),
        "answer_itl_s": spread(during) if during else None,
    }
    engine.shutdown()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--shorts", type=int, default=8)
    parser.add_argument("--gap", type=float, default=1.0, help="seconds between short requests")
    parser.add_argument("--answer", type=int, default=2000, help="tokens of the running answer")
    parser.add_argument("--max-itl-ms", type=float, default=250.0)
    parser.add_argument("--name", default="cpu/fairness", help="of the results")
    args = parser.parse_args()
    capped = {"max_itl_ms": args.max_itl_ms, "max_chunk_ms": 2000.0}
    policies = {"fair": capped, "whole chunks": {}, "one at a time": {"max_num_seqs": 1}}
    start = environment()
    rows = []
    for policy, options in policies.items():
        row = measure(policy, options, args)
        rows.append(row)
        itl = row["answer_itl_s"] or {"p95": float("nan"), "max": float("nan")}
        first = row["short_first_token_s"]
        print(
            f"{policy:14} long {row['long_prefill_s']:7.1f} s   shorts' first token: median "
            f"{first['median']:6.2f} s, max {first['max']:6.2f} s   answer: "
            f"{row['answer_tokens_during_prefill']} tokens, itl p95 {itl['p95']:.3f} s, "
            f"max {itl['max']:.3f} s",
            flush=True,
        )
    print(write(args.name, {**start, "arguments": vars(args)}, rows))


if __name__ == "__main__":
    main()
