"""A cache whose layers wait in host memory, against one on the card; and what the link gives.

    python bench/e2e/offload_gpu.py --json FILE [--model 7b] [--tokens 131072] [--decode 32]

Needs a GPU, a build with CUDA kernels and page-locked host memory for the cache (7b: 7.6 GB for
131,072 tokens). Shapes and random weights as in `model_gpu.py`, dense prefill, a length that fits
with and without offload: both engines answer the same prompt, one after the other, and their
tokens must be the same. A copy counts as hidden as far as the computation did not wait for it, by
events of the card. The link: copies between page-locked memory and the card, in, out and both ways
at once, in one piece and in single pages of 128 KiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from model_gpu import CACHES, build, write
from prefill_attention_sdpa import clocks

from qwen1m_ext import SamplingParams, huge_pages
from qwen1m_ext.choices import missing_gpu
from qwen1m_ext.device import CopyQueue, CudaDevice
from qwen1m_ext.engine import Engine
from qwen1m_ext.offload import OffloadedCache
from qwen1m_ext.offload_copies import Transfer

LINK_BYTES, PAGE_BYTES, REPEATS = 1 << 30, 128 << 10, 5


def link() -> list[dict[str, Any]]:
    """Bytes per second of copies, the fastest of some."""
    device = CudaDevice()
    memory = huge_pages.mapped(2 * LINK_BYTES)
    memory.zero_()
    unlock = device.page_lock(memory)
    host = memory.split(LINK_BYTES)
    card = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=device.where) for _ in host]
    queues = device.copy_queue(), device.copy_queue()
    rows = []
    for piece in (LINK_BYTES, PAGE_BYTES):
        loads = list(zip(card[0].split(piece), host[0].split(piece), strict=True))
        stores = list(zip(host[1].split(piece), card[1].split(piece), strict=True))
        for name, work in (
            ("in", [(queues[0], loads)]),
            ("out", [(queues[1], stores)]),
            ("both", [(queues[0], loads), (queues[1], stores)]),
        ):
            seconds = min(timed(device, work) for _ in range(REPEATS))
            size = LINK_BYTES * len(work)
            rows.append({"link": name, "piece_bytes": piece, "bytes_per_s": size / seconds})
    unlock()
    return rows


def timed(device: CudaDevice, work: Sequence[tuple[CopyQueue, Any]]) -> float:
    """Seconds until all of it is done."""
    begin = device.record(timed=True)
    for queue, _ in work:
        queue.wait(begin)
    for queue, pairs in work:
        queue.copy(pairs)
        device.wait(queue.record())
    end = device.record(timed=True)
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def answer(engine: Engine, tokens: int, decode: int) -> tuple[list[int], dict[str, Any]]:
    """(output, what it took)."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(engine.config.vocab_size, (tokens,), generator=generator).tolist()
    params = SamplingParams(temperature=0, max_tokens=decode, ignore_eos=True)
    handle = engine.submit(ids, params)
    output = handle.result()
    handle.wait()
    metrics = output.metrics
    return list(output.outputs[0].token_ids), {
        "ttft_s": metrics.time_to_first_token,
        "decode_tokens_per_s": metrics.decode_tokens_per_second,
    }


def phases(trace: list[Transfer], loads: int) -> dict[str, dict[str, float]]:
    """Copies of the prefill, which begins with so many loads, and of the decode steps after it."""
    begins = [t.begin for t in trace if t.kind == "load"]
    cut = begins[loads]
    inside: dict[str, Callable[[Transfer], bool]] = {
        "prefill": lambda t: t.begin < cut, "decode": lambda t: t.begin >= cut
    }  # fmt: skip
    rows = {}
    for phase, belongs in inside.items():
        some = [t for t in trace if belongs(t)]
        spent = {k: sum(t.end - t.begin for t in some if t.kind == k) for k in ("load", "store")}
        waited = sum(t.end - t.begin for t in some if t.kind == "wait")
        loaded = sum(t.num_bytes for t in some if t.kind == "load")
        rows[phase] = {
            "loaded_bytes": loaded,
            "load_s": spent["load"],
            "store_s": spent["store"],
            "wait_s": waited,
            "load_bytes_per_s": loaded / spent["load"],
            "hidden_share": 1 - waited / (spent["load"] + spent["store"]),
        }
    return rows


def measure(model: str, tokens: int, decode: int) -> list[dict[str, Any]]:
    """A row for the engine with offload and one for that without."""
    rows, outputs = [], []
    for offload in ("host", None):
        engine = build(
            model, tokens + decode + 1, CACHES[model], True, kv_offload=offload, attention="dense"
        )
        answer(engine, 2 * engine.chunk_tokens, 4)  # what is set up at first use
        trace: list[Transfer] = []
        cache = engine.cache
        if isinstance(cache, OffloadedCache):
            cache.trace = trace
        output, row = answer(engine, tokens, decode)
        if isinstance(cache, OffloadedCache):
            cache.settle()
            chunks = -(-tokens // engine.chunk_tokens)
            row |= phases(trace, chunks * len(cache.streamed))
        outputs.append(output)
        rows.append({"model": model, "tokens": tokens, "kv_offload": offload, **row})
        rows[-1]["plan_bytes"] = engine.plan.items
        rows[-1]["host_bytes"] = engine.plan.host
        engine.shutdown()
        del engine, cache
        gc.collect()
        torch.cuda.empty_cache()
    ours, peer = rows
    for name in ("ttft_s", "decode_tokens_per_s"):
        ours[f"{name}_ratio"] = ours[name] / peer[name]
    ours["same_tokens"] = outputs[0] == outputs[1]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(CACHES), default="7b")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--decode", type=int, default=32)
    arguments = parser.parse_args()
    if missing := missing_gpu():
        sys.exit(f"needs a GPU and a build with CUDA kernels: {missing}")
    before = clocks()
    rows = link() + measure(arguments.model, arguments.tokens, arguments.decode)
    for row in rows:
        print(json.dumps(row), flush=True)
    write(arguments.json, before, rows)
    return int(not all(row.get("same_tokens", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
