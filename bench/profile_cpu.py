"""Where the time of a long prefill and of a decode step goes, as JSON and as a picture.

    python bench/profile_cpu.py [--model DIR] [--tokens 131072] [--decode 64]

Every op and every matrix product is timed from outside; what is left is overhead: Python, small
tensors, sampling. Default: the demo model at 128k. Writes bench/results/cpu/profile.{json,png}.
The picture needs matplotlib (the `plot` extra).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from paired import RESULTS, computed, environment, write

from qwen1m_ext import LLM, SamplingParams, demo_model_path, model, ops
from qwen1m_ext.memory import peak_bytes, resident_bytes

PARTS = ("attention", "linear layers", "other ops", "overhead")


class Stopwatch:
    """Seconds per part; wraps functions in place."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[part] += time.perf_counter() - start

        setattr(owner, name, timed)

    def take(self, total: float) -> dict[str, float]:
        """The parts of `total` seconds since the last call; overhead is what is left."""
        parts = dict(self.spent)
        parts["overhead"] = total - sum(parts.values())
        self.spent = dict.fromkeys(PARTS, 0.0)
        return parts


def draw(rows: list[dict[str, Any]], path: Any) -> None:
    """One horizontal bar per row, its parts in per cent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.9 * len(rows)), layout="constrained")
    colours = ("#1b6ca8", "#6aa84f", "#e0a030", "#b03a2e")
    for y, row in enumerate(rows):
        left = 0.0
        total = sum(row["parts_s"].values())
        for part, colour in zip(PARTS, colours, strict=True):
            width = 100 * row["parts_s"][part] / total
            axes.barh(y, width, left=left, color=colour, label=part if y == 0 else None)
            if width > 2:
                axes.text(left + width / 2, y, f"{width:.0f} %", ha="center", va="center",
                          color="white", fontsize=9)  # fmt: skip
            left += width
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the time (%)")
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--decode", type=int, default=64)
    args = parser.parse_args()
    where = environment()
    watch = Stopwatch()
    for name in ("prefill_attention", "decode_attention"):
        watch.wrap(ops, name, "attention")
    for name in ("embedding", "rms_norm", "swiglu", "qkv_rope_append"):
        watch.wrap(ops, name, "other ops")
    for name in ("project", "linear"):
        watch.wrap(model, name, "linear layers")

    llm = LLM(
        args.model,
        max_model_len=args.tokens + args.decode,
        attention="dense",
        enable_prefix_caching=False,  # the warm-up begins as the prompt does
    )
    ids = torch.randint(32, 127, (args.tokens,), generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0, max_tokens=args.decode, ignore_eos=True)
    llm.generate({"prompt_token_ids": ids[:4096].tolist()}, params)  # warm-up
    watch.take(0)
    resident = resident_bytes()
    stream = llm.stream({"prompt_token_ids": ids.tolist()}, params)
    metrics = next(stream).metrics
    computed(metrics)
    prefill = watch.take(metrics.prefill_seconds)
    for output in stream:
        metrics = output.metrics
    decode = watch.take(metrics.decode_seconds)
    steps = metrics.output_tokens - 1
    rows = [
        {"what": f"prefill of {args.tokens:,} tokens", "seconds": metrics.prefill_seconds,
         "tokens_per_second": metrics.prefill_tokens_per_second, "parts_s": prefill},
        {"what": f"decode at {args.tokens:,} tokens", "seconds_per_token":
         metrics.decode_seconds / steps, "parts_s": decode},
    ]  # fmt: skip
    for row in rows:
        total = sum(row["parts_s"].values())
        print(row["what"], *(f"{p} {100 * s / total:.1f} %" for p, s in row["parts_s"].items()))
    where["peak_bytes"], where["resident_bytes_before"] = peak_bytes(), resident
    print(write("cpu/profile", where, rows))
    draw(rows, RESULTS / "cpu" / "profile.png")


if __name__ == "__main__":
    main()
