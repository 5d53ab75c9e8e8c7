"""prefill_attention on a GPU beside torch SDPA, with its cuDNN and its flash backend.

    python bench/e2e/prefill_attention_sdpa.py --json FILE [--pairs 7] [--lengths 4096 ... 131072]

Needs a GPU and a build with CUDA kernels. Causal, bf16, head_dim 128, 28/4 and 40/8 heads. Each
peer runs in both of its forms: enable_gqa=True on the KV heads, and keys and values expanded to the
query heads beforehand (not timed); a form that a backend refuses is a row with the reason. Ours
reads pages in random order and rotates by angle 0, because SDPA rotates nothing. Outputs are
compared before anything is timed. Pairs are A B A B in one process, timed by events, with a cold L2
cache.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qwen1m_ext import _host, ops

PAGE = ops.PAGE_SIZE
DIM = 128
HEADS = [(28, 4), (40, 8)]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Relative to max(1, |output|). Both sides round the probabilities to bf16 and the output once more,
# which is 2^-8 each time.
LARGEST_DIFFERENCE = 2e-2


def our_call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], object], Tensor]:
    """A function that runs the op over pages in random order, and its output [N, heads, D].

    q: [1, heads, N, D]; k, v: [1, kv_heads, N, D].
    """
    tokens, kv_heads = k.shape[2], k.shape[1]
    pages = -(-tokens // PAGE)
    order = torch.randperm(pages, device=q.device)

    def paged(x: Tensor) -> Tensor:
        cache = torch.zeros(pages, kv_heads, PAGE, DIM, dtype=x.dtype, device=x.device)
        filled = torch.zeros(kv_heads, pages * PAGE, DIM, dtype=x.dtype, device=x.device)
        filled[:, :tokens] = x[0]
        cache[order] = filled.unflatten(1, (pages, PAGE)).transpose(0, 1)
        return cache

    def on_device(values: Tensor) -> Tensor:
        return values.to(q.device)

    q_rows = q[0].transpose(0, 1).contiguous()
    out = torch.empty_like(q_rows)
    rope = torch.tensor([1.0, 0.0]).expand(tokens, DIM // 2, 2).contiguous()
    arguments = (
        out, None, q_rows, paged(k), paged(v), order.int()[None],
        on_device(torch.tensor([0, tokens])), on_device(torch.tensor([tokens])),
        on_device(torch.tensor([1 / math.sqrt(DIM)])), on_device(rope), ops.INFINITE_CHUNK, 0,
    )  # fmt: skip
    return lambda: ops.prefill_attention(*arguments), out


def sdpa_call(
    q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, expanded: bool
) -> Callable[[], Tensor]:
    """A function that runs SDPA with one backend and no other."""
    if expanded:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expanded)

    return call


class Timer:
    """Milliseconds of one call on the GPU, with a cold L2 cache."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, function: Callable[[], object]) -> float:
        """Time one call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def compare(
    timer: Timer, ours: Callable[[], object], peer: Callable[[], object], pairs: int
) -> dict[str, Any]:
    """Warm both up, then time `pairs` pairs in turn; `ratio` > 1 means ours is faster."""
    for _ in range(3):
        ours(), peer()
    timed = [(timer(ours), timer(peer)) for _ in range(pairs)]
    ratios = [b / a for a, b in timed]
    return {
        "ours_ms": statistics.median(a for a, _ in timed),
        "peer_ms": statistics.median(b for _, b in timed),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": pairs,
    }


def matmul_tflops(timer: Timer) -> float:
    """The ceiling: a plain bf16 product of 8192 x 8192 x 8192, random data, median of 10."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / statistics.median(timer(lambda: a @ b) for _ in range(10)) / 1e9


def clocks() -> str:
    """SM and memory clock, temperature and power, as nvidia-smi tells them."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,driver_version"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def measure(timer: Timer, tokens: int, heads: tuple[int, int], pairs: int) -> list[dict[str, Any]]:
    """The rows of one shape."""
    q_heads, kv_heads = heads
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(count: int) -> Tensor:
        return torch.randn(
            1, count, tokens, DIM, generator=generator, device="cuda", dtype=torch.bfloat16
        )

    q, k, v = normal(q_heads), normal(kv_heads), normal(kv_heads)
    ours, out = our_call(q, k, v)
    ours()
    flops = 4 * DIM * q_heads * tokens * (tokens + 1) / 2
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
                expected = peer()[0].transpose(0, 1)
                error = (out.float() - expected.float()).abs() / expected.float().abs().clamp_min(1)
                difference = error.max().item()
                row["largest_difference"] = difference
                if not difference < LARGEST_DIFFERENCE:
                    raise ValueError(f"outputs differ by {difference}: not timed")
                row |= compare(timer, ours, peer, pairs)
                row["ours_tflops"] = flops / row["ours_ms"] / 1e9
                row["peer_tflops"] = flops / row["peer_ms"] / 1e9
                text = (
                    f"ours {row['ours_ms']:9.3f} ms {row['ours_tflops']:6.1f} TFLOP/s | "
                    f"x {row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
                )
            except (RuntimeError, ValueError) as refusal:
                row["error"] = text = str(refusal).splitlines()[0]
            rows.append(row)
            print(f"{tokens:7} tokens {row['heads']:>5} | {row['peer']:17} | {text}", flush=True)
    return rows


def main() -> int:
    """Measure, print and save; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072]
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or "prefill_attention" not in ops.cuda_kernels():
        sys.exit("needs a GPU and a build with CUDA kernels (`qwen1m doctor` shows both)")
    timer = Timer()
    before = clocks()
    ceiling = matmul_tflops(timer)
    print(f"ceiling: {ceiling:.1f} TFLOP/s of a bf16 matrix product")
    rows = []
    for tokens in arguments.lengths:
        for heads in HEADS:
            rows += measure(timer, tokens, heads, max(5, arguments.pairs))
            torch.cuda.empty_cache()
    environment = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "clocks_before": before,
        "clocks_after": clocks(),
        "ceiling_tflops": ceiling,
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
