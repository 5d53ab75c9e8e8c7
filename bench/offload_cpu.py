"""Copies beside computation: a cache whose layers wait in host memory, against one that does not.

    python bench/offload_cpu.py [--prompt 8192] [--output 32] [--chunk 2048] [--pairs 5]

The demo model in float32, with two layer slots and a copy thread; both engines answer the same
prompts in turn, and their answers must be equal to the bit. A copy counts as hidden as far as the
computation did not wait. On a CPU both sides are one memory and share its cores: the ratio is what
the mechanism costs here, not what a card behind a link would see. Writes
bench/results/cpu/offload.{json,png}. The picture needs matplotlib (the `plot` extra).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timeline
import torch
from paired import RESULTS, computed, environment, summary, write

from qwen1m_ext import SamplingParams, demo_model_path
from qwen1m_ext.core import Span
from qwen1m_ext.engine import Engine
from qwen1m_ext.offload import OffloadedCache
from qwen1m_ext.offload_copies import Transfer

COLOURS = {"step": "#1b6ca8", "wait": "#c0392b", "load": "#6aa84f", "store": "#e0a030"}


def answer(engine: Engine, prompt: list[int], output: int) -> tuple[Any, float, float]:
    """(tokens and log probabilities, seconds of prefill, seconds of decode)."""
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, logprobs=2)
    handle = engine.submit(prompt, params)
    result = handle.result()
    handle.wait()
    computed(result.metrics)
    sample = result.outputs[0]
    prefill = result.metrics.prefill_seconds
    return (sample.token_ids, sample.logprobs), prefill, result.metrics.decode_seconds


def share(copies: list[Transfer], phase: list[Span]) -> dict[str, Any]:
    """What was copied in some steps, and how much of that the computation did not wait for."""
    inside = [t for t in copies if phase[0].begin <= t.begin <= phase[-1].end]
    spent = {k: sum(t.end - t.begin for t in inside if t.kind == k) for k in COLOURS}
    copying = spent["load"] + spent["store"]
    return {
        "steps": len(phase),
        "seconds": sum(s.end - s.begin for s in phase),
        "copied_bytes": sum(t.num_bytes for t in inside),
        "copy_s": copying,
        "wait_s": spent["wait"],
        "hidden_share": 1 - spent["wait"] / copying,
    }


def draw(steps: list[Span], copies: list[Transfer], path: Path) -> None:
    """Some steps, one lane each for computing, waiting and the two directions."""
    bars = {"step": [(s.begin, s.end) for s in steps]}
    for kind in ("wait", "load", "store"):
        bars[kind] = [(t.begin, t.end) for t in copies if t.kind == kind]
    lanes = {name: (COLOURS[name], spans) for name, spans in bars.items()}
    title = f"{len(steps)} decode steps with two layer slots"
    timeline.draw(path, title, lanes, steps[0].begin, steps[-1].end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--name", default="cpu/offload", help="of the results")
    args = parser.parse_args()
    start = environment()
    options: dict[str, Any] = {
        "dtype": "float32",
        "attention": "dense",
        "max_model_len": args.prompt + args.output + 1,
        "prefill_chunk_tokens": args.chunk,
        "enable_prefix_caching": False,
    }
    ours = Engine(demo_model_path(), kv_offload="host", **options)
    peer = Engine(demo_model_path(), **options)
    cache = ours.cache
    assert isinstance(cache, OffloadedCache)
    generator = torch.Generator().manual_seed(0)
    prefill, decode = [], []
    for turn in range(args.pairs + 1):  # the first one warms up
        prompt = torch.randint(32, 127, (args.prompt,), generator=generator).tolist()
        spans, copies = ours.trace(), []
        cache.trace = copies
        (text, *a), (same, *b) = (answer(engine, prompt, args.output) for engine in (ours, peer))
        assert text == same, "an offloaded cache gives the same bits"
        if turn:
            prefill.append((a[0], b[0]))
            decode.append((a[1], b[1]))
    steps = sorted((s for s in spans if s.thread == "runner"), key=lambda s: s.begin)
    chunks = -(-args.prompt // args.chunk)
    size = sum(t.nbytes for t in (*cache.k, *cache.v))
    rows = [
        {"phase": "prefill", **summary(prefill), **share(copies, steps[:chunks])},
        {"phase": "decode", **summary(decode), **share(copies, steps[chunks:])},
    ]
    facts = {
        "layers": len(cache.k),
        "cache_bytes": size,
        "device_bytes": sum(t.nbytes for t in cache.device_tensors()),
        "bits_equal": True,
    }
    ours.shutdown()
    peer.shutdown()
    print(write(args.name, {**start, "arguments": vars(args), **facts}, rows))
    for row in rows:
        print(row)
    middle = chunks + (len(steps) - chunks) // 2
    draw(steps[middle : middle + 3], copies, RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
