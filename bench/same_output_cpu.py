"""Same output: what bf16 changes when a request does not run alone; float32 changes nothing.

    python bench/same_output_cpu.py [--tokens 1400 5000] [--output 48] [--long 40000]

The demo model answers the same requests alone and in every way of tests/lib/same_output.py, dense
and sparse (windows of 1,024 tokens; at `--long`, in bf16, the checkpoint's own of 32,768). Tokens
are compared up to the first difference, which has to stand where the two best logits were less than
0.05 apart. `--widen` multiplies as on a CPU without AVX-512, where the height of a bf16 product
decides how it is computed (linear.py). Ends with 1 if a difference is beyond a near-tie. Writes
bench/results/cpu/same_output.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from paired import environment, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from lib.same_output import NEAR_TIE, WAYS, Report, Setup, alone, compare, make_cases
from qwen1m_ext import demo_model_path, linear
from qwen1m_ext.sparse_config import SparseSettings


def row(report: Report) -> dict[str, Any]:
    """Counts and shares."""
    return {
        **dataclasses.asdict(report),
        "near_tie_share": report.near_ties / report.steps_alone,
        "differing_share": report.differing / report.requests,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1400, 5000])
    parser.add_argument("--output", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--long", type=int, default=40_000, help="0: leave it out")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--widen", action="store_true", help="as on a CPU without AVX-512")
    parser.add_argument("--name", default="cpu/same_output", help="of the results")
    args = parser.parse_args()
    if args.widen:
        linear.has_bf16_product = lambda: False
    start = environment()
    short = args.tokens
    windows = SparseSettings(positions="real", window_tokens=1024)
    parts: list[tuple[str, list[int], int, dict[str, Any]]] = [
        ("dense", short, 256, {"attention": "dense"}),
        ("sparse, short windows", short, 1024, {"attention": "sparse", "sparse_settings": windows}),
    ]
    if args.long:
        parts.append(("sparse", [args.long], 32_768, {"attention": "sparse"}))
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        for name, lengths, chunk, options in parts:
            if lengths == [args.long] and dtype == "float32":
                continue
            setup = Setup(Path(demo_model_path()), {"dtype": dtype, **options}, chunk)
            cases = make_cases(lengths, args.output)
            want = alone(setup, cases)
            for way, run in WAYS.items():
                if way == "speculation" and lengths[0] == args.long:
                    continue  # nothing is guessed beside so long a cache
                found = row(compare(*run(setup, cases, want)))
                rows.append({"dtype": dtype, "attention": name, "way": way, **found})
                print(
                    f"{dtype:9} {name:22} {way:34} differing {found['differing']:2} of "
                    f"{found['requests']:2}  near-ties {found['near_tie_share']:6.2%} of steps  "
                    f"log prob error {found['logprob_error']:.1e}",
                    *found["beyond"],
                    flush=True,
                )
    print(write(args.name, {**start, "arguments": vars(args), "near_tie": NEAR_TIE}, rows))
    return 1 if any(r["beyond"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
