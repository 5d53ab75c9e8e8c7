"""Matrix products of linear.py against torch's own bf16 product, as this CPU and as an older one.

    python bench/linear_cpu.py [--pairs 25] [--threads 1] [--size 2048] [--cpus NAME ...]

Three CPUs are measured, each in a process of its own: this one, and this one with torch held to
AVX2 and to AVX-512 without bf16 instructions by ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA. Ours is
"widened" (fp32 blocks, what linear.py chooses on a CPU without AVX-512) and "fp8" (an fp8
matrix). The ratio is the median of pairs; above 1 ours is faster. Writes
bench/results/cpu/linear.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import torch
from paired import compare, environment, write

CPUS = {
    "this CPU": {},
    "AVX-512 without bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
ROWS = (1, 2, 4, 8, 16, 64, 256)


def measure(size: int, pairs: int) -> list[dict[str, Any]]:
    """The rows of one CPU."""
    from qwen1m_ext import linear
    from qwen1m_ext.fp8 import quantise

    weight = torch.randn(size, size).bfloat16()
    fp8 = quantise(weight)
    result = []
    for rows in ROWS:
        x = torch.randn(rows, size).bfloat16()
        out, peer_out = torch.empty_like(x), torch.empty_like(x)

        def peer(x: torch.Tensor = x, out: torch.Tensor = peer_out) -> None:
            torch.mm(x, weight.t(), out=out)

        for what, matrix, native in (("widened", weight, False), ("fp8", fp8, True)):
            with (
                mock.patch.object(linear, "has_bf16_product", lambda native=native: native),
                mock.patch.object(linear, "WIDEN_ROWS", 1),
            ):
                row = compare(
                    lambda x=x, out=out, matrix=matrix: linear.project(out, x, matrix), peer, pairs
                )
            result.append({"what": what, "rows": rows, "size": size, **row})
    return result


def main() -> None:
    """Measure every CPU in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--cpus", nargs="+", choices=CPUS, default=list(CPUS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(measure(args.size, args.pairs)))
        return
    rows = []
    for cpu in args.cpus:
        run = subprocess.run(
            [sys.executable, __file__, "--child", "--pairs", str(args.pairs),
             "--threads", str(args.threads), "--size", str(args.size)],
            env=os.environ | CPUS[cpu], stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        for row in json.loads(run.stdout.splitlines()[-1]):
            rows.append({"cpu": cpu, **row})
            print(f"{cpu:22} {row['what']:8} {row['rows']:4} rows  ratio {row['ratio']:.2f}")
    print(write("cpu/linear", environment(), rows))


if __name__ == "__main__":
    main()
