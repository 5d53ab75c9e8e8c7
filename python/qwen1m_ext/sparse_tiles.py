"""How many rows of sparse prefill share their keys on a GPU, by the lengths of a plan's runs.

A larger tile attends to more keys, since a run of diagonals grows by the tile's rows, and reads
each from L2 less often. With many short runs the first outweighs the second; few long runs hardly
grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GPU_TILES = (64, 128, 256)
"""What the kernels take."""

_ROWS_OF_LOAD = {64: 128, 128: 128, 256: 256}
"""Rows that a key is loaded and multiplied for: a block has 128 and takes the keys of both its
tiles of 64; tiles of 256 are two blocks that share their loads (sparse_prefill_sm90.cuh)."""

TENSOR_FLOPS = 790e12
"""bf16 products of an H200 per second (`estimate.MATMUL_SHARE` of its datasheet's 989e12)."""

L2_BYTES = 5.5e12
"""Bytes per second that an H200's L2 hands to its multiprocessors. Derived from public kernels, not
measured here: FlashAttention-3's 734 TFLOP/s with 128 rows per key load are 5.7e12 bytes of keys
and values, sparse kernels' 315 TFLOP/s with 64 rows are 4.9e12."""


@dataclass(frozen=True)
class TileCost:
    """What a tile size costs one query row far from the prompt's beginning, mean over the heads."""

    tile_tokens: int
    keys: float  # multiplied per row
    load_bytes: float  # of keys and values read from L2, bf16: each load is shared by its rows
    seconds: float  # of the whole machine: the larger of products and loads


def tile_cost(
    tile_tokens: int, runs: Tensor, run_count: Tensor, columns: Tensor, end: int, head_dim: int
) -> TileCost:
    """Predict the cost of a tile size from a plan that was made for a smaller one or the same.

    Args:
        tile_tokens: one of `GPU_TILES`.
        runs: [q_heads, capacity, 2] int32 ascending offsets [lo, hi).
        run_count: [q_heads] int32.
        columns: [q_heads] number of selected columns.
        end: keys there are.
        head_dim: D.
    """
    rows = _ROWS_OF_LOAD[tile_tokens]
    if runs.shape[1] == 0:
        in_runs = torch.zeros(len(runs), dtype=torch.float64)
    else:
        there = torch.arange(runs.shape[1], device=runs.device) < run_count[:, None]
        length = (runs[..., 1] - runs[..., 0]).double()
        # A run grows by rows - 1, but not into the next one.
        gap = torch.full_like(length, float(rows - 1))
        known = there[:, 1:]
        apart = (runs[:, 1:, 0] - runs[:, :-1, 1]).double().clamp(max=rows - 1)
        gap[:, :-1] = torch.where(known, apart, gap[:, :-1])
        in_runs = ((length + gap) * there).sum(1).clamp(max=end)
    # Columns are taken to lie anywhere; those inside of a run count once.
    keys = float((in_runs + columns * (1 - in_runs / end)).mean())
    flops = bytes_loaded = 4.0 * head_dim * keys  # q k^T and p v; k and v in bf16
    return TileCost(
        tile_tokens,
        keys,
        bytes_loaded / rows,
        max(flops / TENSOR_FLOPS, bytes_loaded / rows / L2_BYTES),
    )


def choose_tile(costs: Sequence[TileCost]) -> TileCost:
    """The cheapest; of equal ones the largest, whose rows attend to more of what is loaded."""
    return min(costs, key=lambda cost: (cost.seconds, -cost.tile_tokens))
