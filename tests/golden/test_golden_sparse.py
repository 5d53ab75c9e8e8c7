"""Vertical-slash prefill as public implementations do it: selections, lists, tiles and outputs.

The exact mode of our ops, in float32, against the files sparse_* (README.md here).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.cases import PagedCache, empty_cache
from lib.compare import assert_close
from lib.generator import tensor
from lib.golden import Golden, append, load, right_rules
from lib.sparse import Plan, make_plan, segments
from qwen1m_ext import ops
from qwen1m_ext._host import public_tile
from qwen1m_ext.attention import build_rope_table

FILES = ["sparse_a_d64_c256_t1100", "sparse_c_d64_c1024_t3000_chunked1000"]
STAGES = (2, 1, 0)  # the files have them in this order: intra, successive, inter


@dataclass
class Step:
    """One segment of a run: what our ops made of it."""

    index: int  # of the segment
    begin: int
    end: int
    plan: Plan
    out: Tensor  # [end - begin, H, D]
    keys: list[tuple[int, int]]  # of the stages inter, successive, intra


def inputs(file: Golden) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with the planted columns of README.md."""
    meta = file.meta
    q, k, v = file.qkv(meta["seed_q"], meta["T"])
    group = meta["H"] // meta["KV"]
    c = tensor(777, meta["KV"], meta["D"])
    q = q + np.float32(0.6) * c.repeat_interleave(group, 0)
    t = torch.arange(meta["T"])
    k[(t * 2654435761) % 97 < 4] += np.float32(0.9) * c
    return q, k, v


def run(file: Golden) -> Iterator[Step]:
    """The prompt in its prefill calls, each call segment by segment."""
    meta, (q, k, v) = file.meta, inputs(file)
    heads, dim, total = meta["H"], meta["D"], meta["T"]
    rules = right_rules(meta, total)
    chunk_len = rules.chunk_size - rules.local_size
    table = build_rope_table(meta["rope_theta"], dim, rules.chunk_size + chunk_len)
    scale = torch.tensor([rules.logit_scale])
    cache: PagedCache = empty_cache([total], meta["KV"], dim, torch.float32)
    # The peers read a column budget of 30 as 130.
    v_size = [v + 100 if v == 30 else v for v, _ in meta["heads_vs"]]
    s_size = [s for _, s in meta["heads_vs"]]
    cuts, index = meta["prefill_cuts"], 0
    for call_begin, call_end in zip(cuts, cuts[1:], strict=False):
        now = slice(call_begin, call_end)
        rows = append(rules, q[now], k[now], v[now], cache, 0, range(call_begin, call_end))
        for begin, end in segments(call_begin, call_end, chunk_len):
            last = rows[max(begin, end - meta["last_q"]) - call_begin : end - call_begin]
            vertical, slash = torch.empty(heads, end), torch.empty(heads, end)
            position = (table, end, rules.chunk_size, rules.local_size)
            paged = (cache.k_cache, cache.block_table, scale)
            ops.sparse_estimate(vertical, slash, last, *paged, *position, critical=True)
            plan = make_plan(
                vertical, slash, v_size, s_size, begin, rules.chunk_size, rules.local_size,
                tile_tokens=64, exact=True, fallback=True,
            )  # fmt: skip
            q_rows = rows[begin - call_begin : end - call_begin]
            out = torch.empty_like(q_rows)
            ops.sparse_prefill(
                out, None, q_rows, cache.k_cache, cache.v_cache, cache.block_table, scale, table,
                *plan.tensors(), None, begin, begin, end, rules.chunk_size, rules.local_size,
                tile_tokens=64, exact=True,
            )  # fmt: skip
            intra = begin // chunk_len * chunk_len
            successive = max(0, intra - chunk_len)
            stages = [(0, successive), (successive, intra), (intra, end)]
            yield Step(index, begin, end, plan, out, stages)
            index += 1


@pytest.mark.isa
@pytest.mark.parametrize("name", FILES)
def test_selected_sets(name: str) -> None:
    """The columns and diagonals that the scores select, before anything is made of them."""
    file = load(name)
    v_size = [v + 100 if v == 30 else v for v, _ in file.meta["heads_vs"]]
    for step in run(file):
        for head in range(file.meta["H"]):
            stages = [stage for stage in range(3) if step.keys[stage][0] < step.keys[stage][1]]
            mine = {key for s in stages for key in step.plan.vertical_list(head, s)}
            golden = file[f"seg{step.index}_vtopk"][head, : v_size[head]].tolist()
            # An empty stage has received fallback columns; they are compared as lists below.
            assert set(golden) <= mine
            assert len(mine - set(golden)) <= 5 * len(stages)
            diagonals = {
                step.end - 1 - offset
                for s in stages
                for lo, hi in step.plan.run_list(head, s)
                for offset in range(lo, hi)
            }
            assert set(file[f"seg{step.index}_stopk_h{head}"].tolist()) <= diagonals


@pytest.mark.isa
@pytest.mark.parametrize("name", FILES)
def test_stage_lists_and_tiles(name: str) -> None:
    """Every list of every stage and every tile of 64 rows: no mismatch."""
    file, call, tiles = load(name), 0, 0
    for step in run(file):
        rows = step.end - step.begin
        for stage in STAGES:
            begin, end = step.keys[stage]
            if begin >= end:
                continue
            causal, kv_len = stage == 2, end - begin
            assert file[f"call{call}_shape"].tolist() == [int(causal), rows, kv_len]
            # A diagonal's offset inside the stage, as the peers count it.
            shift = 0 if causal else step.begin - end
            blocks, columns = file[f"call{call}_block_offset"], file[f"call{call}_column_index"]
            for head in range(file.meta["H"]):
                where = f"call {call}, head {head}"
                mine = [key - begin for key in step.plan.vertical_list(head, stage)]
                assert mine == file[f"call{call}_h{head}_v"].tolist(), where
                runs = step.plan.run_list(head, stage)
                diagonals = [offset - shift for lo, hi in runs for offset in range(lo, hi)]
                assert diagonals[::-1] == file[f"call{call}_h{head}_s"].tolist(), where
                for tile in range(-(-rows // 64)):
                    offset = kv_len - rows if causal else kv_len
                    ranges, column_end = public_tile(diagonals, 64 * tile, kv_len, offset, causal)
                    loaded = [key for lo, hi in ranges for key in range(lo, hi, 64)]
                    golden = blocks[head, tile]
                    assert loaded == golden[golden >= 0].tolist(), f"{where}, tile {tile}"
                    inside = lambda key: any(lo <= key < hi for lo, hi in ranges)  # noqa: E731, B023
                    kept = [key for key in mine if key < column_end and not inside(key)]
                    golden = columns[head, tile]
                    assert kept == golden[golden >= 0].tolist(), f"{where}, tile {tile}"
                    tiles += 1
            call += 1
    assert call == file.meta["n_calls"]
    assert tiles > 100


@pytest.mark.isa
@pytest.mark.parametrize("name", FILES)
def test_outputs(name: str) -> None:
    """One shot, and three prefill calls of 1,000 tokens that do not end where chunks of 896 do."""
    file = load(name)
    out = torch.cat([step.out for step in run(file)])
    assert_close(out[file["rows"].long()], file["out"], "golden/fp32")
