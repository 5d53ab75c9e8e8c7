"""Vertical-slash prefill on the CPU against our own dense prefill, in one process.

    python bench/sparse_cpu.py [--shapes demo 7b] [--tokens 32768 131072 524288] [--threads 2]
        [--tile 64] [--pairs 1] [--dense-rows 8192] [--dense-seconds 600]

One layer, one sequence, segments of 32,768 tokens (the engine's grid). Sparse is everything that is
needed: sparse_estimate of the segment's last 64 rows, sparse_plan, sparse_prefill. Random queries
and keys have no pattern, so the plan that is used comes from scores of its own: columns at random,
and diagonals in clusters that hold half of their offsets (lengths log-normal around 50, begins
log-uniform), about as scattered as those of a small real model: SmolLM2-135M at 32k under
(1000, 6096) has 52 runs in the median head and 14,240 keys a row with tiles of 64, these 56 and
14,199. Runs and loaded keys decide the time and are in the JSON. The estimate is computed and timed
all the same.

demo: 4/2 heads of 64; its budgets are those of sparse_attention_config.json beside the demo model,
layer by layer, if there is one, else (100, 800). 7b: 28/4 heads of 128 at (1000, 6096), the most
frequent pair of the published configuration. Dense that would take longer than --dense-seconds is
timed on its last --dense-rows rows and scaled by the exact number of pairs: "extrapolated".
Rotary angles are 0 and Dual Chunk Attention is off: both sides would pay for it alike. Rates count
the pairs of query and key that are multiplied, on the sparse side those that the tiles load.
Writes bench/results/cpu/sparse_prefill.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from paired import environment, summary, write
from torch import Tensor

from qwen1m_ext import demo_model_path, ops

PAGE = 128
SEGMENT = 32_768
LAST_ROWS = 64
SHAPES = {"demo": (4, 2, 64), "7b": (28, 4, 128)}
BUDGETS = {"demo": (100, 800), "7b": (1000, 6096)}
Budgets = list[tuple[int, int]]  # (v, s) of every head


def layer_budgets(shape: str) -> list[tuple[str, Budgets]]:
    """(name, budgets of the heads) of every layer to run."""
    heads = SHAPES[shape][0]
    path = demo_model_path() / "sparse_attention_config.json"
    if shape != "demo" or not path.is_file():
        return [("all heads alike", [BUDGETS[shape]] * heads)]
    layers = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(layers, dict):
        layers = layers["layers"]
    return [
        (f"layer {index}", [tuple(layer[str(head)][1:3]) for head in range(heads)])
        for index, layer in enumerate(layers)
    ]


@dataclass
class Sequence:
    """A cache of `tokens` random tokens; queries come segment by segment."""

    tokens: int
    heads: tuple[int, int, int]
    tile_tokens: int

    def __post_init__(self) -> None:
        """Fill the cache, pages in random order."""
        q_heads, kv_heads, dim = self.heads
        self.generator = torch.Generator().manual_seed(1)
        pages = self.tokens // PAGE
        self.k_cache, self.v_cache = (self.random(pages, kv_heads, PAGE, dim) for _ in range(2))
        self.block_table = torch.randperm(pages, generator=self.generator).int()[None]
        self.rope_table = torch.tensor([1.0, 0.0]).expand(self.tokens, dim // 2, 2).contiguous()
        self.scale = torch.tensor([1 / math.sqrt(dim)])
        self.q = self.random(SEGMENT, q_heads, dim)
        self.out = torch.empty_like(self.q)

    def random(self, *shape: int) -> Tensor:
        """Unit variance, bf16."""
        return torch.randn(*shape, generator=self.generator).bfloat16()

    def segments(self) -> Iterator[tuple[int, int]]:
        """[begin, end) of every segment."""
        for begin in range(0, self.tokens, SEGMENT):
            yield begin, min(begin + SEGMENT, self.tokens)

    def scores(self, end: int, most: int) -> tuple[Tensor, Tensor]:
        """(columns, diagonals) for plans of up to `most` diagonals with runs, see above."""
        heads = self.heads[0]
        slash = torch.rand(heads, end, generator=self.generator) * 1e-3
        for row in slash:
            left = min(most, end)
            for begin, length in zip(*self.clusters(end), strict=True):
                cluster = row[begin : begin + length]
                free = torch.rand(len(cluster), generator=self.generator) < 0.5
                free &= cluster < 1
                # An earlier cluster is better, so that smaller budgets have whole clusters too.
                cluster[free] = 1 + left / most
                left -= int(free.sum())
                if left <= 0:
                    break
        return torch.rand(heads, end, generator=self.generator), slash

    def clusters(self, end: int) -> tuple[list[int], list[int]]:
        """Begins and lengths of more clusters of diagonals than any budget takes."""
        at, length = torch.rand(4096, generator=self.generator), self.random(4096).float()
        begins = (100 * (max(end, 101) / 100) ** at).long()
        return begins.tolist(), (50 * length.exp()).long().add(1).tolist()

    def dense(self, begin: int, end: int) -> None:
        """Attention of rows [begin, end) to all before them."""
        rows = slice(0, end - begin)
        ops.prefill_attention(
            self.out[rows], None, self.q[rows], self.k_cache, self.v_cache, self.block_table,
            torch.tensor([0, end - begin]), torch.tensor([end]), self.scale, self.rope_table,
            ops.INFINITE_CHUNK, 0,
        )  # fmt: skip


@dataclass
class Segment:
    """One segment of a sequence under given budgets, with its tensors."""

    sequence: Sequence
    begin: int
    end: int
    budgets: Budgets

    def __post_init__(self) -> None:
        """Make the scores and the tensors that the engine would own."""
        heads, end, tile = len(self.budgets), self.end, self.sequence.tile_tokens
        self.v_size, self.s_size = (
            torch.tensor(sizes) for sizes in zip(*self.budgets, strict=True)
        )
        columns = ops.sparse_vertical_capacity(int(self.v_size.max()), end)
        runs = ops.sparse_run_capacity(int(self.s_size.max()), end, tile)
        self.lists = (
            torch.zeros(heads, columns, dtype=torch.int32),
            torch.zeros(heads, 3, dtype=torch.int32),
            torch.zeros(heads, 3, runs, 2, dtype=torch.int32),
            torch.zeros(heads, 3, dtype=torch.int32),
        )
        self.sums = torch.empty(heads, end), torch.empty(heads, end)
        self.scores = self.sequence.scores(end, int(self.s_size.max()))

    def estimate(self) -> None:
        """Column and diagonal sums of the last rows."""
        s = self.sequence
        last = s.q[self.end - self.begin - LAST_ROWS : self.end - self.begin]
        ops.sparse_estimate(
            *self.sums, last, s.k_cache, s.block_table, s.scale, s.rope_table, self.end,
            ops.INFINITE_CHUNK, 0, False,
        )  # fmt: skip

    def plan(self) -> None:
        """The lists of every head."""
        ops.sparse_plan(
            *self.lists, *self.scores, self.v_size, self.s_size, self.begin, ops.INFINITE_CHUNK, 0,
            self.sequence.tile_tokens,
        )  # fmt: skip

    def prefill(self) -> None:
        """Attention of all rows over the lists."""
        s, rows = self.sequence, slice(0, self.end - self.begin)
        ops.sparse_prefill(
            s.out[rows], None, s.q[rows], s.k_cache, s.v_cache, s.block_table, s.scale,
            s.rope_table, *self.lists, None, self.begin, self.begin, self.end, ops.INFINITE_CHUNK,
            0, s.tile_tokens,
        )  # fmt: skip

    def loaded_pairs(self) -> int:
        """Pairs of query and key that the tiles multiply, of all heads; causal ones only."""
        verticals, vertical_count, runs, run_count = self.lists
        tile, total = self.sequence.tile_tokens, 0
        for head in range(len(self.budgets)):
            lo, hi = runs[head, 2, : run_count[head, 2]].long().unbind(-1)
            keys = verticals[head, : vertical_count[head, 2]].long()
            for t0 in range(self.begin, self.end, tile):
                t1 = min(t0 + tile, self.end)
                first, last = (t0 - hi + 1).clamp(min=0), t1 - lo
                before = (last.clamp(max=t0) - first).clamp(min=0).sum()
                # Runs are ascending in offset, so descending in key.
                near = torch.searchsorted(first.flip(0), keys, right=True) - 1
                inside = (near >= 0) & (keys < last.flip(0)[near.clamp(min=0)])
                before += ((keys < t0) & ~inside).sum()
                # The tile's own keys: those of a run that reaches them, row by row.
                own = sum(
                    max(0, min(row, int(end)) - max(t0, int(begin)) + 1)
                    for begin, end in zip(first, last - 1, strict=True)
                    if end >= t0
                    for row in range(t0, t1)
                )
                total += int(before) * (t1 - t0) + own
        return total


def seconds(function: Callable[[], None]) -> float:
    """Wall-clock seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def causal_pairs(begin: int, end: int, heads: int) -> int:
    """Pairs of rows [begin, end) with all keys up to their own."""
    return heads * (end * (end + 1) - begin * (begin + 1)) // 2


def time_dense(sequence: Sequence, rows: int, limit_s: float, rate: float) -> dict[str, Any]:
    """Seconds of the whole prompt; extrapolated from its last rows if `rate` says it takes long."""
    heads, tokens = sequence.heads[0], sequence.tokens
    pairs = causal_pairs(0, tokens, heads)
    if pairs / rate <= limit_s:
        took = sum(seconds(lambda s=s: sequence.dense(*s)) for s in sequence.segments())
        return {"dense_s": took, "dense_pairs": pairs, "dense": "measured"}
    some = causal_pairs(tokens - rows, tokens, heads)
    took = seconds(lambda: sequence.dense(tokens - rows, tokens)) * pairs / some
    return {"dense_s": took, "dense_pairs": pairs, "dense": f"extrapolated from {rows} rows"}


def measure(
    sequence: Sequence, budgets: Budgets, arguments: argparse.Namespace, rate: float
) -> dict[str, Any]:
    """One layer: dense and sparse in turn."""
    timed, loaded, runs, parts = [], 0, [], {"estimate_s": 0.0, "plan_s": 0.0, "prefill_s": 0.0}
    dense: dict[str, Any] = {}
    for pair in range(arguments.pairs):
        took = dict.fromkeys(parts, 0.0)
        for begin, end in sequence.segments():
            segment = Segment(sequence, begin, end, budgets)
            took["estimate_s"] += seconds(segment.estimate)
            took["plan_s"] += seconds(segment.plan)
            took["prefill_s"] += seconds(segment.prefill)
            if pair == 0:
                loaded += segment.loaded_pairs()
                runs.append(segment.lists[3][:, 2].float().mean().item())
        dense = time_dense(sequence, arguments.dense_rows, arguments.dense_seconds, rate)
        timed.append((sum(took.values()), dense["dense_s"]))
        parts = took
    heads, _, dim = sequence.heads
    row = summary(timed) | dense | parts
    flops = 4 * dim
    return row | {
        "keys_per_row": loaded / heads / sequence.tokens,
        "runs_per_head": sum(runs) / len(runs),
        "sparse_gflops": flops * loaded / row["prefill_s"] / 1e9,
        "dense_gflops": flops * row["dense_pairs"] / row["peer_s"] / 1e9,
    }


def describe(row: dict[str, Any]) -> str:
    """A row as one line."""
    return (
        f"{row['shape']:5} {row['tokens']:7} tokens {row['budgets']:>12} "
        f"| sparse {row['ours_s']:8.2f} s {row['sparse_gflops']:6.0f} GFLOP/s "
        f"(estimate {row['estimate_s']:.2f} s, plan {row['plan_s']:.2f} s) "
        f"| dense {row['peer_s']:8.2f} s {row['dense_gflops']:6.0f} GFLOP/s ({row['dense']}) "
        f"| x {row['ratio']:.2f} "
        f"| {row['keys_per_row']:.0f} keys a row, {row['runs_per_head']:.0f} runs a head"
    )


def main() -> None:
    """Run the cases and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["demo", "7b"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[32_768, 131_072])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tile", type=int, default=64, help="rows of a tile")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--dense-rows", type=int, default=8192)
    parser.add_argument("--dense-seconds", type=float, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start, rows = environment(), []
    for shape in arguments.shapes:
        for tokens in arguments.tokens:
            if tokens % PAGE:
                raise SystemExit(f"--tokens: expected multiples of {PAGE}, got {tokens}")
            sequence = Sequence(tokens, SHAPES[shape], arguments.tile)
            probe = max(0, tokens - 1024), tokens
            sequence.dense(*probe)  # warm
            rate = causal_pairs(*probe, sequence.heads[0]) / seconds(
                lambda s=sequence, p=probe: s.dense(*p)
            )
            for name, budgets in layer_budgets(shape):
                row = {
                    "shape": shape,
                    "heads": "{}/{} x {}".format(*sequence.heads),
                    "tokens": tokens,
                    "budgets": name if name.startswith("layer") else str(budgets[0]),
                    "budgets_of_heads": budgets,
                    "tile_tokens": arguments.tile,
                    "peer": "prefill_attention (dense)",
                } | measure(sequence, budgets, arguments, rate)
                rows.append(row)
                print(describe(row), flush=True)
    print(write("cpu/sparse_prefill", start, rows))


if __name__ == "__main__":
    main()
