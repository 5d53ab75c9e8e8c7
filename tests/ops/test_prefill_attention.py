"""prefill_attention against its float64 definition, its bits, and its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lib.arguments import good_arguments
from lib.cases import (
    DTYPES,
    AttentionInputs,
    Case,
    assert_attention,
    assert_gaps_untouched,
    attention_inputs,
    case,
    cases,
    spread,
)
from lib.compare import assert_same_bits
from lib.emulator import operator, torch_device
from lib.refuse import refuses
from lib.threads import threads
from qwen1m_ext import ops
from reference.attention import attention


def run(inputs: AttentionInputs, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Call the op; returns (out, lse). `out` has the strides of q, so its gaps are known NaN."""
    where = torch_device(device)
    q = inputs.q.to(where)
    out = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=where)
    torch.empty(0, dtype=q.dtype, device=where).set_(out.untyped_storage()).fill_(float("nan"))
    lse = torch.full(q.shape[:2], float("nan"), device=where)
    operator("prefill_attention", device)(
        out,
        lse,
        q,
        inputs.cache.k_cache.to(where),
        inputs.cache.v_cache.to(where),
        inputs.cache.block_table.to(where),
        inputs.cu_q.to(where),
        inputs.kv_len.to(where),
        inputs.logit_scale.to(where),
        inputs.rope_table.to(where),
        inputs.chunk_size,
        inputs.local_size,
    )
    if where == "cpu":
        assert_gaps_untouched(out)
    return out, lse


def reference(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Float64 (out, lse) of all rows."""
    rows = []
    for sequence, (k, v) in enumerate(zip(inputs.k, inputs.v, strict=True)):
        begin, end = inputs.cu_q[sequence], inputs.cu_q[sequence + 1]
        tokens = torch.arange(len(k) - inputs.q_len[sequence], len(k))
        scale = inputs.logit_scale[sequence : sequence + 1]
        rows.append(
            attention(
                inputs.q[begin:end],
                tokens,
                k,
                v,
                scale,
                inputs.rope_table,
                inputs.chunk_size,
                inputs.local_size,
            )
        )
    if not rows:
        return inputs.q.double(), inputs.q[..., 0].double()
    out, lse = zip(*rows, strict=True)
    return torch.cat(out), torch.cat(lse)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("prefill_attention"))
def test_matches_definition(case: Case, dtype: str, device: str) -> None:
    """Tile, page and chunk edges, GQA, varlen batches, over a NaN-poisoned cache."""
    inputs = attention_inputs(case, DTYPES[dtype])
    assert_attention(run(inputs, device), reference(inputs), dtype, case["logit_factor"], device)


BITWISE_CASES = [
    "tile_plus_1",
    "page_plus_1",
    "four_chunks",
    "chunk_896_border",
    "chunk_not_of_64",
    "chunk_below_page",
    "chunk_of_7",
    "gqa_7",
    "head_dim_80",
    "peaked_softmax",
]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", BITWISE_CASES)
def test_any_split_into_calls_gives_the_same_bits(
    name: str, dtype: torch.dtype, device: str
) -> None:
    """One call, odd chunks, row by row: a row does not see the cut (nor where its pages lie)."""
    inputs = attention_inputs(case("prefill_attention", name), dtype)
    together = run(inputs, device)
    rows = inputs.q_len[0]
    # A call of an emulated kernel takes a second for what the others do in a millisecond.
    steps = (97,) if device.startswith("emu") else (1, 17, 64, 97, 128)
    for step in steps:
        # Row by row is slow, and every 5th row meets every tile edge in some case.
        begins = range(0, rows, 5) if step == 1 else range(0, rows, step)
        for begin in begins:
            end = min(begin + step, rows)
            part = run(inputs.part(0, begin, end), device)
            for actual, expected in zip(part, together, strict=True):
                assert_same_bits(actual, expected[begin:end], f"rows {begin}..{end - 1}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["batch", "strided_rows"])
def test_a_sequence_does_not_see_its_batch(name: str, dtype: torch.dtype, device: str) -> None:
    """Each sequence alone gives the bits it has in the batch."""
    inputs = attention_inputs(case("prefill_attention", name), dtype)
    together = run(inputs, device)
    for sequence, rows in enumerate(inputs.q_len):
        begin = int(inputs.cu_q[sequence])
        alone = run(inputs.part(sequence, 0, rows), device)
        for actual, expected in zip(alone, together, strict=True):
            assert_same_bits(actual, expected[begin : begin + rows], f"sequence {sequence}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["four_chunks", "batch"])
def test_threads_do_not_change_bits(name: str, dtype: torch.dtype, device: str) -> None:
    """1, 2 and 3 threads."""
    inputs = attention_inputs(case("prefill_attention", name), dtype)
    outputs = []
    for count in (1, 2, 3):
        with threads(count):
            outputs.append(run(inputs, device))
    for other in outputs[1:]:
        for actual, expected in zip(other, outputs[0], strict=True):
            assert_same_bits(actual, expected)


def test_a_chunk_that_never_ends_is_plain_rope(device: str) -> None:
    """Below chunk_len + 1 tokens, Dual Chunk positions and plain RoPE are one thing."""
    inputs = attention_inputs(case("prefill_attention", "chunk_224"), torch.float32)
    plain = replace(inputs, chunk_size=ops.INFINITE_CHUNK, local_size=0)
    for actual, expected in zip(run(inputs, device), run(plain, device), strict=True):
        assert_same_bits(actual, expected)


def test_lse_is_optional(device: str) -> None:
    """Without lse, `out` has the same bits."""
    call = operator("prefill_attention", device)
    arguments = good_arguments("prefill_attention", device)
    with_lse = arguments["out"].clone()
    call(**(arguments | dict(out=with_lse)))
    call(**(arguments | dict(lse=None)))
    assert_same_bits(arguments["out"], with_lse)


@pytest.mark.isa
def test_extreme_logits(device: str) -> None:
    """Logits of +-1e4: the softmax is a choice, finite and exact; ties share."""
    q = torch.zeros(3, 1, 16)
    q[:, 0, 0] = 1e4
    k = torch.zeros(3, 1, 16)
    k[:, 0, 0] = torch.tensor([-1.0, 1.0, 1.0])
    v = torch.arange(3).float()[:, None, None].expand(3, 1, 16).contiguous()
    inputs = AttentionInputs(
        q=q,
        k=[k],
        v=[v],
        q_len=[3],
        logit_scale=torch.tensor([1.0]),
        rope_table=torch.tensor([1.0, 0.0]).expand(3, 8, 2).contiguous(),
        chunk_size=ops.INFINITE_CHUNK,
        local_size=0,
    )
    out, lse = run(inputs, device)
    assert out[:, 0, 0].tolist() == [0.0, 1.0, 1.5]
    assert torch.equal(lse[:2, 0].cpu(), torch.tensor([-1e4, 1e4]))


def test_strides_of_small_tensors(device: str) -> None:
    """lse, block_table, lengths and scales need not be contiguous."""
    call = operator("prefill_attention", device)
    arguments = good_arguments("prefill_attention", device)
    call(**arguments)
    apart = arguments | dict(
        out=torch.zeros_like(arguments["out"]),
        lse=spread(torch.zeros_like(arguments["lse"])),
        block_table=spread(arguments["block_table"]),
        cu_q=spread(arguments["cu_q"]),
        kv_len=spread(arguments["kv_len"]),
        logit_scale=spread(arguments["logit_scale"]),
    )
    call(**apart)
    for name in ("out", "lse"):
        assert_same_bits(apart[name], arguments[name], name)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_offsets_beyond_2_to_the_31(dtype: torch.dtype, device: str) -> None:
    """Pages and query rows more than 2^31 elements apart (never resident as a whole)."""
    inputs = attention_inputs(case("prefill_attention", "two_chunks_clamp"), dtype)
    where = torch_device(device)
    expected = run(inputs, device)
    small = inputs.cache
    pages = 2**31 // small.k_cache[0].numel() + 8
    shift = pages - len(small.k_cache)
    k_cache, v_cache = (
        torch.empty((pages, *small.k_cache.shape[1:]), dtype=dtype, device=where) for _ in range(2)
    )
    k_cache[shift:], v_cache[shift:] = small.k_cache.to(where), small.v_cache.to(where)
    rows, stride = 2, 2**31 + 64
    q = torch.empty(stride + 4 * 64, dtype=dtype, device=where).as_strided(
        (rows, 4, 64), (stride, 64, 1)
    )
    q.copy_(inputs.q[-rows:])
    out = torch.empty_strided(q.shape, q.stride(), dtype=dtype, device=where)
    lse = torch.zeros(rows, 4, device=where)
    block_table = (small.block_table.long() + shift).clamp_max(2**31 - 1).int()
    operator("prefill_attention", device)(
        out,
        lse,
        q,
        k_cache,
        v_cache,
        block_table.to(where),
        torch.tensor([0, rows], device=where),
        inputs.kv_len.to(where),
        inputs.logit_scale.to(where),
        inputs.rope_table.to(where),
        inputs.chunk_size,
        inputs.local_size,
    )
    assert_same_bits(out.contiguous(), expected[0][-rows:])
    assert_same_bits(lse, expected[1][-rows:], "lse")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(out=lambda t: t.bfloat16()), ("out", "float32", "bfloat16")),
        (dict(lse=lambda t: t.double()), ("lse", "float32", "float64")),
        (dict(out=lambda t: t.as_strided(t.shape, (16, 16, 1))), ("out", "overlap")),
        (dict(lse=lambda t: t[:, :1].expand(t.shape)), ("lse", "overlap")),
        (dict(q=lambda t: t.double()), ("q", "float32", "float64")),
        (dict(k_cache=lambda t: t.bfloat16()), ("k_cache", "float32", "bfloat16")),
        (dict(v_cache=lambda t: t.bfloat16()), ("v_cache", "float32", "bfloat16")),
        (dict(block_table=lambda t: t.long()), ("block_table", "int32", "int64")),
        (dict(cu_q=lambda t: t.int()), ("cu_q", "int64", "int32")),
        (dict(kv_len=lambda t: t.int()), ("kv_len", "int64", "int32")),
        (dict(logit_scale=lambda t: t.double()), ("logit_scale", "float32", "float64")),
        (dict(rope_table=lambda t: t.double()), ("rope_table", "float32", "float64")),
        (dict(out=lambda t: t[:4]), ("out", "5", "4")),
        (dict(lse=lambda t: t[:4]), ("lse", "5", "4")),
        (dict(q=lambda t: t[..., :8]), ("16", "8")),
        (dict(q=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)), ("q", "contiguous")),
        (dict(out=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
         ("out", "contiguous")),
        (dict(k_cache=lambda t: t[:, :, :64].contiguous()), ("k_cache", "128", "64")),
        (dict(v_cache=lambda t: t[:3]), ("v_cache", "4", "3")),
        (dict(v_cache=lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
         ("v_cache", "contiguous")),
        (dict(cu_q=lambda t: t[:2]), ("cu_q", "3", "2")),
        (dict(kv_len=lambda t: t[:1]), ("cu_q", "batch + 1=2", "[3]")),
        (dict(logit_scale=lambda t: t[:1]), ("logit_scale", "2", "1")),
        (dict(cu_q=lambda t: t + torch.tensor([1, 0, 0])), ("cu_q", "0", "1")),
        (dict(cu_q=lambda t: t + torch.tensor([0, 4, 0])), ("cu_q", "6")),
        (dict(cu_q=lambda t: t + torch.tensor([0, 0, 1])), ("cu_q", "5", "6")),
        (dict(cu_q=lambda t: t - torch.tensor([0, 0, 1])), ("cu_q", "5", "4")),
        (dict(kv_len=lambda t: t - torch.tensor([0, 5])), ("kv_len", "3", "2")),
        (dict(kv_len=lambda t: t + torch.tensor([127, 0])), ("kv_len", "256", "257")),
        (dict(kv_len=lambda t: -t), ("kv_len", "-130")),
        (dict(block_table=lambda t: t + torch.tensor([[1, 0], [0, 0]]).int()),
         ("block_table", "4")),
        (dict(block_table=lambda t: t - torch.tensor([[0, 2], [0, 0]]).int()),
         ("block_table", "-1")),
        (dict(logit_scale=lambda t: t * 0), ("logit_scale", "0")),
        (dict(logit_scale=lambda t: t * float("nan")), ("logit_scale", "nan")),
        (dict(rope_table=lambda t: t[:48]), ("rope_table", "49", "48")),
        (dict(rope_table=lambda t: t[:, :7].contiguous()), ("rope_table", "8", "7")),
        (dict(chunk_size=lambda _: 0), ("chunk_size", "0")),
        (dict(local_size=lambda _: 48), ("local_size", "48")),
        (dict(local_size=lambda _: -1), ("local_size", "-1")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_refuses(change: dict, text: tuple[str, ...], device: str) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    refuses(
        ops.prefill_attention,
        good_arguments("prefill_attention", device),
        change,
        ("prefill_attention", *text),
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(q=lambda t: t.repeat(1, 3, 1)[:, :3], out=lambda t: t.repeat(1, 3, 1)[:, :3],
              lse=lambda t: t.repeat(1, 3)[:, :3], k_cache=lambda t: t.repeat(1, 2, 1, 1),
              v_cache=lambda t: t.repeat(1, 2, 1, 1)), ("q_heads", "3")),
        (dict(q=lambda t: t[..., :8].contiguous(), out=lambda t: t[..., :8].contiguous(),
              k_cache=lambda t: t[..., :8].contiguous(),
              v_cache=lambda t: t[..., :8].contiguous(),
              rope_table=lambda t: t[:, :4].contiguous()), ("16", "8")),
    ],
    ids=["heads_not_divisible", "head_dim_8"],
)  # fmt: skip
def test_refuses_head_geometry(change: dict, text: tuple[str, ...], device: str) -> None:
    """q_heads is a multiple of kv_heads, D a multiple of 16."""
    refuses(ops.prefill_attention, good_arguments("prefill_attention", device), change, text)
