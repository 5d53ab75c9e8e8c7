"""How much of the scheduler's and the output processor's time is hidden behind the model.

    python bench/overlap_cpu.py [--streams 16] [--output 128] [--prompt 2048]

Streams with logprobs and stop strings on the demo model, traced. An instant of a thread counts as
hidden when the runner is at work in it; what the runner waits for between steps is its idle time.
Writes bench/results/cpu/overlap.{json,png}. The picture needs matplotlib (the `plot` extra).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timeline
import torch
from paired import RESULTS, environment, write

from qwen1m_ext import SamplingParams, demo_model_path
from qwen1m_ext.core import Span
from qwen1m_ext.engine import Engine

THREADS = {"runner": "#1b6ca8", "scheduler": "#6aa84f", "outputs": "#e0a030"}


def hidden(spans: list[Span], behind: list[Span]) -> float:
    """Seconds of `spans` that lie within `behind` (which do not overlap, in order)."""
    total, first = 0.0, 0
    for span in sorted(spans, key=lambda s: s.begin):
        while first < len(behind) and behind[first].end < span.begin:
            first += 1
        for other in behind[first:]:
            if other.begin > span.end:
                break
            total += max(0.0, min(span.end, other.end) - max(span.begin, other.begin))
    return total


def summarise(trace: list[Span]) -> dict[str, Any]:
    """Shares of one traced run."""
    by = {name: [s for s in trace if s.thread == name] for name in THREADS}
    runner = sorted(by["runner"], key=lambda s: s.begin)
    gaps = [b.begin - a.end for a, b in zip(runner, runner[1:], strict=False)]
    whole = runner[-1].end - runner[0].begin
    row: dict[str, Any] = {
        "steps": len(runner),
        "seconds": whole,
        "runner_busy_share": sum(s.end - s.begin for s in runner) / whole,
        "runner_gap_us": {
            "median": 1e6 * sorted(gaps)[len(gaps) // 2],
            "p95": 1e6 * sorted(gaps)[int(0.95 * len(gaps))],
        },
    }
    for name in ("scheduler", "outputs"):
        spent = sum(s.end - s.begin for s in by[name])
        row[f"{name}_s"] = spent
        row[f"{name}_hidden_share"] = hidden(by[name], runner) / spent
    return row


def draw(trace: list[Span], path: Path, steps: int = 12) -> None:
    """A window from the middle of the run, one lane per thread."""
    runner = sorted((s for s in trace if s.thread == "runner"), key=lambda s: s.begin)
    middle = runner[len(runner) // 2 :][:steps]
    lanes = {
        name: (colour, [(s.begin, s.end) for s in trace if s.thread == name])
        for name, colour in THREADS.items()
    }
    title = f"{len(middle)} steps from the middle of the run"
    timeline.draw(path, title, lanes, middle[0].begin, middle[-1].end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--name", default="cpu/overlap", help="of the results")
    args = parser.parse_args()
    start = environment()
    engine = Engine(demo_model_path(), max_model_len=args.streams * (args.prompt + args.output) + 1)
    params = SamplingParams(
        temperature=0, max_tokens=args.output, ignore_eos=True, logprobs=5, stop=["\x00\x01"]
    )
    generator = torch.Generator().manual_seed(0)
    for turn in range(2):  # the first one warms up
        trace = engine.trace()
        prompts = torch.randint(32, 127, (args.streams, args.prompt), generator=generator).tolist()
        handles = [engine.submit(prompt, params) for prompt in prompts]
        for handle in handles:
            handle.result()
            handle.wait()
        if turn:
            row = summarise(trace)
    engine.shutdown()
    print(write(args.name, {**start, "arguments": vars(args)}, [row]))
    for name, value in row.items():
        print(f"{name:24} {value}")
    draw(trace, RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
