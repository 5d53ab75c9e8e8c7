"""rms_norm (+ residual) and swiglu on a GPU beside torch.compile of the same formulas.

    python bench/e2e/norms_torch.py --json FILE [--pairs 7]

Needs a GPU and a build with CUDA kernels. bf16 rows of the 7B and 14B models. Outputs are compared
before anything is timed; pairs are A B A B in one process, timed by events, with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen1m_ext import ops

EPS = 1e-6
# Both round once to bf16; the residual of torch.compile may stay in float32 inside of one kernel.
LARGEST_DIFFERENCE = 2.0**-6
FLUSH_BYTES = 256 << 20


def add_norm(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(normed, new residual) as a model would write it."""
    total = (residual.float() + x.float()).to(x.dtype)
    row = total.float()
    return (
        (row * torch.rsqrt(row.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight,
        total,
    )


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def milliseconds(call: Callable[[], object], flush: Tensor) -> float:
    """One run behind a cold L2 cache."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def compare(ours: Callable[[], object], peer: Callable[[], object], pairs: int) -> dict[str, Any]:
    """Medians of both and of the ratio pair by pair (peer / ours: above 1 we are faster)."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        ours()
        peer()
    times = [(milliseconds(ours, flush), milliseconds(peer, flush)) for _ in range(pairs)]
    return {
        "ours_us": 1e3 * statistics.median(a for a, _ in times),
        "peer_us": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(b / a for a, b in times),
        "pairs": pairs,
    }


def check(actual: Tensor, expected: Tensor) -> None:
    """Both compute the same."""
    error = (actual.float() - expected.float()).abs() / expected.float().abs().clamp_min(1)
    assert error.max() <= LARGEST_DIFFERENCE, f"outputs differ by {error.max().item():.3g}"


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not {"rms_norm", "swiglu"} <= set(ops.cuda_kernels()):
        sys.exit("needs a GPU and a build with CUDA kernels (`qwen1m doctor` shows both)")
    compiled_norm, compiled_gated = (torch.compile(f, dynamic=False) for f in (add_norm, gated))
    rows = []
    for tokens in (1, 4096, 32768):
        for hidden in (3584, 5120):
            x, residual = (torch.randn(tokens, hidden, device="cuda").bfloat16() for _ in "xr")
            weight = torch.randn(hidden, device="cuda").bfloat16()
            out, mine = torch.empty_like(x), residual.clone()
            ops.rms_norm(out, mine, x, weight, EPS)
            check(out, compiled_norm(residual, x, weight)[0])
            result = compare(
                lambda o=out, m=mine, x=x, w=weight: ops.rms_norm(o, m, x, w, EPS),
                lambda r=residual, x=x, w=weight: compiled_norm(r, x, w),
                options.pairs,
            )
            rows.append({"op": "rms_norm + residual", "tokens": tokens, "width": hidden, **result})
    for tokens in (1, 4096):
        for width in (18944, 13824):
            gate_up = torch.randn(tokens, 2 * width, device="cuda").bfloat16()
            out = torch.empty(tokens, width, dtype=torch.bfloat16, device="cuda")
            ops.swiglu(out, gate_up)
            check(out, compiled_gated(gate_up))
            result = compare(
                lambda o=out, g=gate_up: ops.swiglu(o, g),
                lambda g=gate_up: compiled_gated(g),
                options.pairs,
            )
            rows.append({"op": "swiglu", "tokens": tokens, "width": width, **result})
    for row in rows:
        print(f"{row['op']:20} {row['tokens']:6} x {row['width']:5} | {row['ours_us']:8.1f} us | "
              f"torch.compile {row['peer_us']:8.1f} us | {row['ratio']:.2f}x")  # fmt: skip
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python bench/e2e/norms_torch.py --pairs {options.pairs}",
    }  # fmt: skip
    options.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
