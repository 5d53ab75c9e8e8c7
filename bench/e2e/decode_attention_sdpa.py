"""decode_attention on a GPU beside torch SDPA, with its cuDNN and its flash backend.

    python bench/e2e/decode_attention_sdpa.py --json FILE [--pairs 7] [--lengths 8192 ... 1010000]

Needs a GPU and a build with CUDA kernels. One sequence and one new token, bf16, head_dim 128, 28/4
and 40/8 heads; ours reads pages in random order. SDPA rotates nothing, so ours rotates by angle 0.
The last row of a shape is ours with an fp8 cache, beside ours with a bf16 one.
The peers, their two forms and the way of timing are those of prefill_attention_sdpa.py. The share
of the memory's speed is against a copy measured in the same process, which counts the bytes that it
reads and those that it writes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from prefill_attention_sdpa import (
    BACKENDS,
    DIM,
    HEADS,
    LARGEST_DIFFERENCE,
    PAGE,
    Timer,
    clocks,
    compare,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qwen1m_ext import _host, ops

LARGEST_DIFFERENCE_FP8 = 4e-2
"""attention/fp8_cache of docs/numerics.md."""


def quantise(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Pages in e4m3 and the least powers of two, [kv_heads], that bring them to at most 448."""
    largest = torch.stack([page.abs().amax((1, 2)) for page in pages]).amax(0).float()
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
    codes = torch.empty(pages.shape, dtype=torch.float8_e4m3fn, device=pages.device)
    for page, to in zip(pages, codes, strict=True):
        to.copy_(page.float() / scale[:, None, None])
    return codes, scale


def our_call(
    q: Tensor, k: Tensor, v: Tensor, fp8: bool = False
) -> tuple[Callable[[], object], Tensor]:
    """A function that runs the op over pages in random order, and its output [1, 1, heads, D].

    q: [1, heads, 1, D]; k, v: [1, kv_heads, N, D].
    """
    tokens, kv_heads = k.shape[2], k.shape[1]
    pages = -(-tokens // PAGE)
    order = torch.randperm(pages, device=q.device)

    def paged(x: Tensor) -> Tensor:
        cache = torch.zeros(pages, kv_heads, PAGE, DIM, dtype=x.dtype, device=x.device)
        for page in range(pages):  # a million tokens in one indexed copy would need a third buffer
            rows = x[0, :, page * PAGE : (page + 1) * PAGE]
            cache[int(order[page]), :, : rows.shape[1]] = rows
        return cache

    order = order.cpu()
    q_rows = q.transpose(1, 2).contiguous()
    out = torch.empty_like(q_rows)
    rope = torch.tensor([1.0, 0.0]).expand(tokens, DIM // 2, 2).contiguous().to(q.device)
    k_cache, v_cache, block_table = paged(k), paged(v), order.int()[None].to(q.device)
    scales: tuple[Tensor | None, Tensor | None] = None, None
    if fp8:
        (k_cache, k_scale), (v_cache, v_scale) = quantise(k_cache), quantise(v_cache)
        scales = k_scale, v_scale
    arguments = (
        out, None, q_rows, k_cache, v_cache, block_table,
        torch.tensor([tokens], device=q.device),
        torch.tensor([[1 / math.sqrt(DIM)]], device=q.device), rope, ops.INFINITE_CHUNK, 0,
        ops.decode_attention_scratch(q_rows, k_cache, block_table, ops.INFINITE_CHUNK, 0), *scales,
    )  # fmt: skip
    return lambda: ops.decode_attention(*arguments), out


def sdpa_call(
    q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, expanded: bool
) -> Callable[[], Tensor]:
    """A function that runs SDPA with one backend and no other."""
    if expanded:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=not expanded)

    return call


def copy_gb_per_s(timer: Timer) -> float:
    """Bytes read and written by a copy of 2 GiB, median of 10."""
    source = torch.ones(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    milliseconds = statistics.median(timer(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.nbytes / milliseconds / 1e6


def measure(
    timer: Timer, tokens: int, heads: tuple[int, int], pairs: int, copy: float
) -> list[dict[str, Any]]:
    """The rows of one shape."""
    q_heads, kv_heads = heads
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(count: int, rows: int) -> Tensor:
        return torch.randn(
            1, count, rows, DIM, generator=generator, device="cuda", dtype=torch.bfloat16
        )

    q, k, v = normal(q_heads, 1), normal(kv_heads, tokens), normal(kv_heads, tokens)
    ours, out = our_call(q, k, v)
    ours()
    read = 2 * k.nbytes
    rows = []
    for name, backend in BACKENDS.items():
        for expanded in (False, True):
            row: dict[str, Any] = {
                "tokens": tokens,
                "heads": f"{q_heads}/{kv_heads}",
                "peer": f"{name} {'expanded' if expanded else 'enable_gqa'}",
            }
            try:
                peer = sdpa_call(q, k, v, backend, expanded)
                expected = peer().transpose(1, 2)
                error = (out.float() - expected.float()).abs() / expected.float().abs().clamp_min(1)
                row["largest_difference"] = difference = error.max().item()
                if not difference < LARGEST_DIFFERENCE:
                    raise ValueError(f"outputs differ by {difference}: not timed")
                row |= compare(timer, ours, peer, pairs)
                row["ours_gb_per_s"] = read / row["ours_ms"] / 1e6
                row["share_of_copy"] = row["ours_gb_per_s"] / copy
                text = (
                    f"ours {1e3 * row['ours_ms']:8.1f} us {row['ours_gb_per_s']:7.1f} GB/s "
                    f"({row['share_of_copy']:.0%} of a copy) | "
                    f"x {row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                )
            except (RuntimeError, ValueError) as refusal:
                row["error"] = text = str(refusal).splitlines()[0]
            rows.append(row)
            print(f"{tokens:7} tokens {row['heads']:>5} | {row['peer']:17} | {text}", flush=True)
    narrow, narrow_out = our_call(q, k, v, fp8=True)
    narrow()
    row = {"tokens": tokens, "heads": f"{q_heads}/{kv_heads}", "peer": "ours, bf16 cache"}
    row["largest_difference"] = difference = (narrow_out - out).abs().max().item()
    row |= {"cache": "fp8", **compare(timer, narrow, ours, pairs)}
    row["ours_gb_per_s"] = read / 2 / row["ours_ms"] / 1e6
    row["share_of_copy"] = row["ours_gb_per_s"] / copy
    if not difference < LARGEST_DIFFERENCE_FP8:
        row["error"] = f"outputs differ by {difference}"
    rows.append(row)
    print(
        f"{tokens:7} tokens {row['heads']:>5} | {row['peer']:17} | "
        f"fp8 {1e3 * row['ours_ms']:9.1f} us {row['ours_gb_per_s']:7.1f} GB/s "
        f"({row['share_of_copy']:.0%} of a copy) | "
        f"x {row['ratio']:.2f} {row.get('error', '')}",
        flush=True,
    )
    return rows


def main() -> int:
    """Measure, print and save; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 32768, 131072, 262144, 1010000]
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or "decode_attention" not in ops.cuda_kernels():
        sys.exit("needs a GPU and a build with CUDA kernels (`qwen1m doctor` shows both)")
    timer = Timer()
    before = clocks()
    copy = copy_gb_per_s(timer)
    print(f"a copy: {copy:.1f} GB/s read and written")
    rows = []
    for tokens in arguments.lengths:
        for heads in HEADS:
            rows += measure(timer, tokens, heads, max(5, arguments.pairs), copy)
            torch.cuda.empty_cache()
    environment = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "clocks_before": before,
        "clocks_after": clocks(),
        "copy_gb_per_s": copy,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "build": _host.build_info(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
    return int(any("outputs differ" in row.get("error", "") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
