"""Arguments that fit, then spoilt at random: an op runs or raises RuntimeError, it never crashes.

A crash ends the test process, so that the whole run fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen1m_ext import ops

pytestmark = pytest.mark.soak
FUZZ = settings(max_examples=1000, suppress_health_check=list(HealthCheck))

TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM, PAGES, ROWS = 5, 4, 2, 16, 4, 64
COLUMNS = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])


def integers(values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def good_arguments(op: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one op that fit."""
    rows = torch.randn(TOKENS, 24, dtype=dtype)
    if op == "rms_norm":
        return {
            "out": torch.empty_like(rows),
            "residual": rows.clone(),
            "x": rows,
            "weight": rows[0].clone(),
            "eps": 1e-6,
        }
    if op == "swiglu":
        return {"out": torch.empty_like(rows), "gate_up": torch.randn(TOKENS, 48, dtype=dtype)}
    if op == "embedding":
        return {
            "out": torch.empty_like(rows),
            "weight": rows,
            "token_ids": integers([4, 0, 0, 3, 1]),
        }
    if op == "sample":
        return {
            "token_ids": integers([0] * TOKENS),
            "logprobs": torch.empty(TOKENS),
            "history": torch.zeros(TOKENS, 24, dtype=torch.int32),
            "logits": rows,
            "temperature": torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0]),
            "top_k": integers([0, 3, 5, -1, 100]),
            "top_p": torch.tensor([1.0, 0.5, 0.9, 0.2, 1.0]),
            "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 1.0]),
            "penalties": torch.tensor([[1.1, 0.5, -0.5]]).repeat(TOKENS, 1),
            "seed": integers([1, 2, 3, 4, 5]),
            "position": integers([5, 4, 3, 2, 1]),
        }
    cache = torch.randn(PAGES, KV_HEADS, 128, HEAD_DIM, dtype=dtype)
    q = torch.randn(TOKENS, Q_HEADS, HEAD_DIM, dtype=dtype)
    if op == "widen_pages":
        codes, scale = cache.to(torch.float8_e4m3fn), torch.ones(KV_HEADS)
        return {"wide": cache, "codes": codes, "scale": scale, "pages": integers([3, 1])}
    shared = {"k_cache": cache, "v_cache": cache.clone()}
    table = {"rope_table": torch.randn(ROWS, HEAD_DIM // 2, 2)}
    if op == "qkv_rope_append":
        return {
            "q": q,
            **shared,
            "qkv": torch.randn(TOKENS, COLUMNS, dtype=dtype),
            "bias": torch.randn(COLUMNS, dtype=dtype),
            "positions": integers([0, 1, 2, 100, 5]),
            "slot_mapping": integers([0, 511, -1, 127, 128]),
            **table,
            "chunk_len": 50,
        }
    paged = {
        **shared,
        "block_table": integers([[3, 1], [0, 2]], torch.int32),
    }
    lengths = {
        "kv_len": integers([40, 200]),
        "logit_scale": torch.tensor([0.25, 0.3]),
        **table,
        "chunk_size": 60,
        "local_size": 10,
    }
    if op == "prefill_attention":
        lse = torch.empty(TOKENS, Q_HEADS)
        cu_q = {"cu_q": integers([0, 2, TOKENS])}
        return {"out": torch.empty_like(q), "lse": lse, "q": q, **paged, **cu_q, **lengths}
    if op.startswith("sparse"):
        return sparse_arguments(op, q, shared)
    q = torch.randn(2, 3, Q_HEADS, HEAD_DIM, dtype=dtype)
    lse = torch.empty(2, 3, Q_HEADS)
    lengths["logit_scale"] = torch.tensor([[0.25, 0.3, 0.2], [0.3, 0.1, 0.4]])
    return {"out": torch.empty_like(q), "lse": lse, "q": q, **paged, **lengths}


def sparse_arguments(op: str, q: torch.Tensor, shared: dict[str, Any]) -> dict[str, Any]:
    """Of the ops of sparse prefill: tokens 100 to 139 are a segment, the last of chunks of 50."""
    end, chunks = 140, {"chunk_size": 60, "local_size": 10}
    counts, lists = torch.ones(Q_HEADS, 3, dtype=torch.int32), torch.int32
    runs = integers([[3, 5], [80, 90]], lists).expand(Q_HEADS, 3, 2, 2).contiguous()
    verticals = integers([10, 60, 120], lists).expand(Q_HEADS, 3).contiguous()
    if op == "sparse_plan":
        return {
            "verticals": torch.empty(Q_HEADS, 20, dtype=lists),
            "vertical_count": counts,
            "runs": torch.empty(Q_HEADS, 3, 6, 2, dtype=lists),
            "run_count": counts.clone(),
            "vertical_score": torch.rand(Q_HEADS, end),
            "slash_score": torch.rand(Q_HEADS, end),
            "v_size": integers([5] * Q_HEADS),
            "s_size": integers([6] * Q_HEADS),
            "segment_begin": 100,
            **chunks,
            "tile_tokens": 64,
            "group": 1,
            "exact": False,
            "fallback": True,
        }
    one = {"block_table": integers([[3, 1]], lists), "logit_scale": torch.tensor([0.25])}
    rope = {"rope_table": torch.randn(120, HEAD_DIM // 2, 2)}
    if op == "sparse_estimate":
        return {
            "vertical": torch.empty(Q_HEADS, end),
            "slash": torch.empty(Q_HEADS, end),
            "q": q,
            "k_cache": shared["k_cache"],
            **one,
            **rope,
            "segment_end": end,
            **chunks,
            "critical": True,
        }
    return {
        "out": torch.empty_like(q),
        "lse": torch.empty(TOKENS, Q_HEADS),
        "q": q,
        **shared,
        **one,
        **rope,
        "verticals": verticals,
        "vertical_count": counts,
        "runs": runs,
        "run_count": counts.clone(),
        "scratch": None,
        "q_begin": 120,
        "segment_begin": 100,
        "segment_end": end,
        **chunks,
        "tile_tokens": 64,
        "exact": False,
    }


NUMBERS = st.one_of(
    st.integers(-3, 600), st.sampled_from([-(2**63), -(2**62), 2**31, 2**62, 2**63 - 1])
)


def spoil(value: Any, data: st.DataObject) -> Any:
    """Another number, or a tensor of another type, shape, stride or content."""
    if isinstance(value, float):
        return data.draw(st.sampled_from([0.0, -1.0, 1e30]))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return data.draw(NUMBERS)
    if value is None:
        return torch.empty(2, 3)
    way = data.draw(
        st.sampled_from(["value", "dtype", "rank", "size", "stride", "expand", "empty"])
    )
    dim = data.draw(st.integers(0, value.dim() - 1))
    if way == "value" and not value.is_floating_point():
        limit = torch.iinfo(value.dtype)
        number = max(limit.min, min(limit.max, data.draw(NUMBERS)))
        value = value.clone()
        value.view(-1)[data.draw(st.integers(0, value.numel() - 1))] = number
        return value
    if way in ("value", "dtype"):
        types = [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.int8]
        return value.to(data.draw(st.sampled_from(types)))
    if way == "rank":
        return value.unsqueeze(dim) if data.draw(st.booleans()) else value.select(dim, 0)
    if way == "size":
        return value.narrow(dim, 0, data.draw(st.integers(0, value.size(dim)))).contiguous()
    if way == "stride":
        other = data.draw(st.integers(0, value.dim() - 1))
        return value.transpose(dim, other).contiguous().transpose(dim, other)
    if way == "expand":
        return value.narrow(dim, 0, 1).expand(value.shape)
    return value.new_empty(0)


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_spoilt_arguments_never_crash(op):
    """At most two arguments are spoilt, so that the later checks are reached too."""
    outcomes = {"ran": 0, "raised": 0}
    torch.manual_seed(0)

    @FUZZ
    @given(data=st.data(), dtype=FLOATS)
    def run(data: st.DataObject, dtype: torch.dtype) -> None:
        arguments = good_arguments(op, dtype)
        for name in data.draw(
            st.lists(st.sampled_from(sorted(arguments)), max_size=2, unique=True)
        ):
            arguments[name] = spoil(arguments[name], data)
        try:
            getattr(ops, op)(**arguments)
        except RuntimeError as error:
            assert f"{op}: " in str(error), error
            outcomes["raised"] += 1
        else:
            outcomes["ran"] += 1

    run()
    assert min(outcomes.values()) > 50, outcomes
