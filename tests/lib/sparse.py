"""Plans of sparse prefill: their tensors, and the ops that fill and use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib import generator
from lib.cases import AttentionInputs, Case, attention_inputs
from lib.emulator import operator, torch_device
from qwen1m_ext import ops
from reference import sparse as reference

SCORE_SEEDS = {"vertical": 51, "slash": 52}


@dataclass
class Plan:
    """The lists of include/qwen1m/sparse_plan.h."""

    verticals: Tensor  # [q_heads, capacity] int32
    vertical_count: Tensor  # [q_heads, 3] int32
    runs: Tensor  # [q_heads, 3, capacity, 2] int32
    run_count: Tensor  # [q_heads, 3] int32

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the ops' arguments."""
        return self.verticals, self.vertical_count, self.runs, self.run_count

    def vertical_list(self, head: int, stage: int) -> list[int]:
        """Keys, ascending."""
        begin = int(self.vertical_count[head, :stage].sum())
        return self.verticals[head, begin : begin + int(self.vertical_count[head, stage])].tolist()

    def run_list(self, head: int, stage: int) -> list[tuple[int, int]]:
        """Offsets [lo, hi), ascending."""
        rows = self.runs[head, stage, : int(self.run_count[head, stage])]
        return [(lo, hi) for lo, hi in rows.tolist()]


def empty_plan(
    v_size: Tensor, s_size: Tensor, segment_end: int, tile_tokens: int, exact: bool = False
) -> Plan:
    """Tensors of the capacity that these budgets need, filled with what no list may hold."""
    heads = len(v_size)
    columns = ops.sparse_vertical_capacity(int(v_size.max()), segment_end)
    runs = ops.sparse_run_capacity(int(s_size.max()), segment_end, tile_tokens, exact)
    return Plan(
        torch.full((heads, columns), -7, dtype=torch.int32),
        torch.full((heads, 3), -7, dtype=torch.int32),
        torch.full((heads, 3, runs, 2), -7, dtype=torch.int32),
        torch.full((heads, 3), -7, dtype=torch.int32),
    )


def make_plan(
    vertical: Tensor,
    slash: Tensor,
    v_size: Tensor | list[int],
    s_size: Tensor | list[int],
    segment_begin: int,
    chunk_size: int,
    local_size: int,
    tile_tokens: int,
    group: int = 1,
    exact: bool = False,
    fallback: bool = False,
    device: str = "cpu",
) -> Plan:
    """ops.sparse_plan into new tensors, which come back to the host."""
    v_size, s_size = torch.as_tensor(v_size), torch.as_tensor(s_size)
    plan = empty_plan(v_size, s_size, vertical.shape[1], tile_tokens, exact)
    where = torch_device(device)
    tensors = [x.to(where) for x in (*plan.tensors(), vertical, slash, v_size, s_size)]
    operator("sparse_plan", device)(
        *tensors, segment_begin, chunk_size, local_size, tile_tokens, group, exact, fallback
    )
    return Plan(*(x.cpu() for x in tensors[:4]))


def plan_of(verticals: list[list[list[int]]], runs: list[list[list[tuple[int, int]]]]) -> Plan:
    """A plan with given lists, [head][stage]."""
    flat = [[key for stage in head for key in stage] for head in verticals]
    columns = max(1, *map(len, flat))
    longest = max(1, *(len(stage) for head in runs for stage in head))
    plan = Plan(
        torch.full((len(flat), columns), -7, dtype=torch.int32),
        torch.tensor([[len(stage) for stage in head] for head in verticals]).int(),
        torch.full((len(flat), 3, longest, 2), -7, dtype=torch.int32),
        torch.tensor([[len(stage) for stage in head] for head in runs]).int(),
    )
    for head, keys in enumerate(flat):
        plan.verticals[head, : len(keys)] = torch.tensor(keys).int()
        for stage, pairs in enumerate(runs[head]):
            plan.runs[head, stage, : len(pairs)] = torch.tensor(pairs).reshape(-1, 2).int()
    return plan


def segments(begin: int, end: int, chunk_len: int) -> list[tuple[int, int]]:
    """[begin, end) cut at the borders of the Dual Chunks."""
    cuts = []
    while begin < end:
        stop = min(end, (begin // chunk_len + 1) * chunk_len)
        cuts.append((begin, stop))
        begin = stop
    return cuts


def scores(case: Case) -> tuple[Tensor, Tensor]:
    """(vertical, slash) scores [q_heads, end] of a sparse_prefill case, by its kind of pattern."""

    def one(name: str) -> Tensor:
        values = generator.tensor(SCORE_SEEDS[name], case["q_heads"], case["end"])
        if case["scores"] == "equal":
            return torch.ones_like(values)
        if case["scores"] == "one":  # nearly nothing but one column, one diagonal
            values = values.abs() * 1e-6
            values[:, case["end"] // 2] = 60.0
        if case["scores"] == "clustered":  # runs: a moving average
            kernel = torch.full((1, 1, 25), 1 / 25)
            values = torch.nn.functional.conv1d(values[:, None], kernel, padding=12)[:, 0]
        return values

    return one("vertical"), one("slash")


def budgets(case: Case) -> tuple[list[int], list[int]]:
    """v_size and s_size of every head: those of the case, over and over."""
    heads = range(case["q_heads"])
    v, s = (case[name] for name in ("v_size", "s_size"))
    return [v[h % len(v)] for h in heads], [s[h % len(s)] for h in heads]


def reference_plan(case: Case, **switches: bool) -> list[tuple[list, list]]:
    """(verticals, runs) of every head of a sparse_prefill case, by the definition."""
    chunk_len = case["chunk_size"] - case["local_size"]
    return [
        reference.plan(
            v, s, v_size, s_size, case["begin"], chunk_len, case["tile_tokens"], **switches
        )
        for v, s, v_size, s_size in zip(*scores(case), *budgets(case), strict=True)
    ]


def sparse_inputs(case: Case, dtype: torch.dtype) -> AttentionInputs:
    """The tensors of a sparse_prefill case: the segment's rows are the last of `end` tokens."""
    lengths = {"kv_len": [case["end"]], "q_len": [case["end"] - case["begin"]]}
    return attention_inputs(case | lengths, dtype)


def run_sparse(
    inputs: AttentionInputs,
    plan: Plan,
    segment: tuple[int, int],
    tile_tokens: int,
    rows: tuple[int, int] | None = None,
    exact: bool = False,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Call sparse_prefill for rows [begin, end) of a segment (default: all); (out, lse).

    `out` has the strides of q, so its gaps are known NaN.
    """
    where = torch_device(device)
    begin, end = segment
    first, last = rows or segment
    q = inputs.q.to(where)[first - begin : last - begin]
    out = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=where)
    torch.empty(0, dtype=q.dtype, device=where).set_(out.untyped_storage()).fill_(float("nan"))
    lse = torch.full(q.shape[:2], float("nan"), device=where)
    scratch = None
    if device != "cpu":  # poisoned: only what the op writes there may be read
        heads, capacity = plan.verticals.shape
        shape = (2, heads, capacity + 1, q.shape[-1])
        scratch = torch.full(shape, float("nan"), dtype=q.dtype, device=where)
    cache = inputs.cache
    tensors = (
        cache.k_cache, cache.v_cache, cache.block_table, inputs.logit_scale, inputs.rope_table,
        *plan.tensors(),
    )  # fmt: skip
    operator("sparse_prefill", device)(
        out, lse, q, *(x.to(where) for x in tensors), scratch, first, begin, end,
        inputs.chunk_size, inputs.local_size, tile_tokens, exact,
    )  # fmt: skip
    return out, lse
