"""The time left that a long prefill tells, against the time it then took.

    python bench/eta_cpu.py [--tokens 524288] [--attention sparse]

The demo model, a fresh engine that has seen no step. The engine's `Progress` events are kept and
the first one at or beyond each share of the prompt is held against the end; 1 is exact, above 1 the
prefill ended earlier than told. Writes bench/results/cpu/eta.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from paired import environment, write

from qwen1m_ext import SamplingParams, demo_model_path
from qwen1m_ext.engine import Engine
from qwen1m_ext.events import Progress
from qwen1m_ext.haystack import make_sample

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[524_288])
    parser.add_argument("--attention", default="sparse", choices=["dense", "sparse"])
    parser.add_argument("--name", default="cpu/eta", help="of the results")
    args = parser.parse_args()
    start = environment()
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        engine = Engine(demo_model_path(), max_model_len=tokens + 64, attention=args.attention)
        prompt = list(make_sample(tokens, seed=3).prompt.encode())
        told: list[tuple[float, Progress]] = []
        params = SamplingParams(temperature=0, max_tokens=1)
        begin = time.perf_counter()

        def note(progress: Progress, told: list[Any] = told) -> None:
            told.append((time.perf_counter(), progress))

        engine.submit(prompt, params, on_progress=note).result()
        end = told[-1][0]
        engine.shutdown()
        for share in SHARES:
            now, progress = next(t for t in told if t[1].done >= share * tokens)
            assert progress.eta is not None
            rows.append(
                {
                    "tokens": tokens, "attention": args.attention, "done": progress.done,
                    "share": share, "elapsed_s": now - begin, "told_s": progress.eta,
                    "left_s": end - now, "told_to_left": progress.eta / (end - now),
                }
            )  # fmt: skip
            print(
                f"{tokens:>9,} {args.attention}: at {progress.done / tokens:5.1%}  told "
                f"{progress.eta:6.1f} s, took {end - now:6.1f} s  ({rows[-1]['told_to_left']:.2f})",
                flush=True,
            )
    print(write(args.name, {**start, "arguments": vars(args)}, rows))


if __name__ == "__main__":
    main()
