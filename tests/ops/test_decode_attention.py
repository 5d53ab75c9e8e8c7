"""decode_attention against its float64 definition, its bits, and its refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
from lib.compare import assert_close, assert_same_bits
from lib.emulator import operator, torch_device
from lib.refuse import refuses
from lib.threads import threads
from qwen1m_ext import ops
from reference.attention import attention
from reference.fp8 import dequantise, quantise, scale_of


def run(inputs: AttentionInputs, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Call the op; returns (out [batch, q_tokens, q_heads, D], lse [batch, q_tokens, q_heads])."""
    q_tokens = inputs.q_len[0] if inputs.q_len else 1
    where = torch_device(device)
    q = inputs.q.to(where).unflatten(0, (len(inputs.k), q_tokens))
    out = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=where)
    torch.empty(0, dtype=q.dtype, device=where).set_(out.untyped_storage()).fill_(float("nan"))
    lse = torch.full(q.shape[:3], float("nan"), device=where)
    operator("decode_attention", device)(
        out,
        lse,
        q,
        inputs.cache.k_cache.to(where),
        inputs.cache.v_cache.to(where),
        inputs.cache.block_table.to(where),
        inputs.kv_len.to(where),
        inputs.logit_scale.to(where),
        inputs.rope_table.to(where),
        inputs.chunk_size,
        inputs.local_size,
    )
    if where == "cpu":
        assert_gaps_untouched(out)
    return out, lse


def reference(inputs: AttentionInputs, q_tokens: int) -> tuple[Tensor, Tensor]:
    """Float64 (out, lse) of all rows; a sequence without keys gives 0 and -inf."""
    heads, dim = inputs.q.shape[1:]
    out = torch.zeros(len(inputs.k), q_tokens, heads, dim, dtype=torch.float64)
    lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float64)
    for sequence, (k, v) in enumerate(zip(inputs.k, inputs.v, strict=True)):
        if len(k):
            out[sequence], lse[sequence] = attention(
                inputs.q[sequence * q_tokens : (sequence + 1) * q_tokens],
                torch.arange(len(k) - q_tokens, len(k)),
                k,
                v,
                inputs.logit_scale[sequence],
                inputs.rope_table,
                inputs.chunk_size,
                inputs.local_size,
            )
    return out, lse


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("decode_attention"))
def test_matches_definition(case: Case, dtype: str, device: str) -> None:
    """Tile, page, chunk and split edges, GQA, very different lengths, a NaN-poisoned cache."""
    inputs = attention_inputs(case, DTYPES[dtype])
    expected = reference(inputs, case["q_tokens"])
    assert_attention(run(inputs, device), expected, dtype, case["logit_factor"], device)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "name",
    ["chunk_224_edges", "chunk_896", "chunk_below_page", "eight_tokens", "very_different_lengths"],
)
def test_a_sequence_does_not_see_its_batch(name: str, dtype: torch.dtype, device: str) -> None:
    """Each sequence alone, its pages elsewhere, gives the bits it has in the batch."""
    inputs = attention_inputs(case("decode_attention", name), dtype)
    together = run(inputs, device)
    for sequence, rows in enumerate(inputs.q_len):
        alone = run(inputs.part(sequence, 0, rows) if len(inputs.k[sequence]) else inputs, device)
        for actual, expected in zip(alone, together, strict=True):
            at = 0 if len(inputs.k[sequence]) else sequence
            assert_same_bits(actual[at], expected[sequence], f"sequence {sequence}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["chunk_896", "very_different_lengths", "eight_tokens"])
def test_threads_do_not_change_bits(name: str, dtype: torch.dtype, device: str) -> None:
    """1, 2 and 3 threads: the split over the keys depends on kv_len alone."""
    inputs = attention_inputs(case("decode_attention", name), dtype)
    outputs = []
    for count in (1, 2, 3):
        with threads(count):
            outputs.append(run(inputs, device))
    for other in outputs[1:]:
        for actual, expected in zip(other, outputs[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["eight_tokens", "sixteen_tokens", "split_inside_the_tokens"])
def test_a_row_has_the_bits_that_it_has_alone(name: str, dtype: torch.dtype) -> None:
    """On the CPU: rows that are computed together are those of calls of one token each."""
    inputs = attention_inputs(case("decode_attention", name), dtype)
    out, lse = run(inputs)
    for sequence, tokens in enumerate(inputs.q_len):
        for row in range(tokens if len(inputs.k[sequence]) else 0):
            alone = run(inputs.part(sequence, row, row + 1))
            assert_same_bits(alone[0][0, 0], out[sequence, row], f"{sequence}, row {row}")
            assert_same_bits(alone[1][0, 0], lse[sequence, row], f"lse of {sequence}, row {row}")


@dataclass
class Fp8:
    """An fp8 copy of a case's cache, and what it stands for."""

    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor  # [kv_heads]
    v_scale: Tensor
    meant: AttentionInputs  # float64 keys and values

    @classmethod
    def of(cls, inputs: AttentionInputs) -> Fp8:
        """With the scales of all sequences together."""
        k_scale, v_scale = scale_of(torch.cat(inputs.k)), scale_of(torch.cat(inputs.v))

        def rounded(values: list[Tensor], scale: Tensor) -> list[Tensor]:
            scale = scale[:, None]
            return [dequantise(quantise(x, scale), scale) for x in values]

        return cls(
            quantise(inputs.cache.k_cache, k_scale[:, None, None]),
            quantise(inputs.cache.v_cache, v_scale[:, None, None]),
            k_scale,
            v_scale,
            replace(inputs, k=rounded(inputs.k, k_scale), v=rounded(inputs.v, v_scale)),
        )

    def run(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """The op; returns (out, lse)."""
        inputs, where = self.meant, torch_device(device)
        q = inputs.q.to(where).unflatten(0, (len(inputs.k), inputs.q_len[0]))
        out = torch.full_like(q, float("nan"))
        lse = torch.full(q.shape[:3], float("nan"), device=where)
        tensors = (
            self.k_cache, self.v_cache, inputs.cache.block_table, inputs.kv_len,
            inputs.logit_scale, inputs.rope_table,
        )  # fmt: skip
        operator("decode_attention", device)(
            out, lse, q, *(t.to(where) for t in tensors), inputs.chunk_size, inputs.local_size,
            k_scale=self.k_scale.to(where), v_scale=self.v_scale.to(where),
        )  # fmt: skip
        return out, lse


FP8_CASES = ["tile_edges", "page_edges", "chunk_896", "chunk_not_of_64", "eight_tokens", "gqa_7",
             "rows_of_two_blocks", "sixteen_tokens", "head_dim_80", "very_different_lengths",
             "peaked_softmax"]  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FP8_CASES)
def test_fp8_cache_matches_definition(name: str, dtype: str, device: str) -> None:
    """Attention over the values that the codes stand for, with a scale for each head.

    The GPU kernels multiply in fp16, which is finer than the bf16 that their budget is for.
    """
    one = case("decode_attention", name)
    fp8 = Fp8.of(attention_inputs(one, DTYPES[dtype]))
    # With values of one variance all scales are nearly one: a mix-up must not pass.
    k_factors = torch.arange(1, len(fp8.k_scale) + 1) / 2
    v_factors = 0.75 / torch.arange(1, len(fp8.v_scale) + 1)
    fp8.k_scale *= k_factors
    fp8.v_scale *= v_factors
    fp8.meant.k = [k * k_factors[:, None] for k in fp8.meant.k]
    fp8.meant.v = [v * v_factors[:, None] for v in fp8.meant.v]
    largest = one["logit_factor"] * k_factors.max().item()
    expected = reference(fp8.meant, one["q_tokens"])
    assert_attention(fp8.run(device), expected, dtype, largest, device)


@pytest.mark.isa
@pytest.mark.parametrize("name", ["page_edges", "gqa_7", "chunk_896"])
def test_fp8_cache_is_near_the_unrounded_one(name: str) -> None:
    """What the rounding of keys and values itself costs."""
    inputs = attention_inputs(case("decode_attention", name), torch.float32)
    out, lse = Fp8.of(inputs).run()
    expected = reference(inputs, 1)
    assert_close(out, expected[0], "attention/fp8_cache")
    assert_close(lse, expected[1], "lse/fp8_cache", "lse")


def test_fp8_keys_of_300() -> None:
    """A bias of 300 in one channel, as the models' keys have: the others keep their precision."""
    inputs = attention_inputs(case("decode_attention", "gqa_7"), torch.float32)
    k = [x.clone() for x in inputs.k]
    for x in k:
        x[..., 5] += 300.0
    fp8 = Fp8.of(replace(inputs, k=k))
    assert 0.6 < fp8.k_scale.min() < 0.8
    out, lse = fp8.run()
    expected = reference(fp8.meant, 1)
    # Logits of 30 instead of 1: as much more room.
    assert_close(out, expected[0], "attention/fp32", "out", factor=30)
    assert_close(lse, expected[1], "lse/fp32", "lse", factor=30)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(k_scale=lambda _: None), ("k_scale", "none")),
        (dict(v_scale=lambda _: None), ("v_scale", "none")),
        (dict(k_scale=lambda t: t.double()), ("k_scale", "float32", "float64")),
        (dict(k_scale=lambda t: t[:1]), ("k_scale", "2", "1")),
        (dict(v_scale=lambda t: -t), ("v_scale[0]", "> 0")),
        (dict(k_cache=lambda t: t.float()), ("k_cache", "float8_e4m3fn", "float32")),
        (dict(v_cache=lambda t: t.bfloat16()), ("v_cache", "float8_e4m3fn", "bfloat16")),
        (dict(k_scale=lambda _: None, v_scale=lambda _: None),
         ("k_cache", "float32", "float8_e4m3fn")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_fp8_refuses(change: dict, text: tuple[str, ...]) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    fp8 = Fp8.of(attention_inputs(case("decode_attention", "page_edges"), torch.float32))
    inputs = fp8.meant
    q = inputs.q.unflatten(0, (len(inputs.k), 1))
    arguments = dict(
        out=torch.zeros_like(q), lse=None, q=q, k_cache=fp8.k_cache, v_cache=fp8.v_cache,
        block_table=inputs.cache.block_table, kv_len=inputs.kv_len, logit_scale=inputs.logit_scale,
        rope_table=inputs.rope_table, chunk_size=inputs.chunk_size, local_size=inputs.local_size,
        k_scale=fp8.k_scale, v_scale=fp8.v_scale,
    )  # fmt: skip
    refuses(ops.decode_attention, arguments, change, ("decode_attention", *text))


def test_empty_sequence_gives_zero_and_minus_infinity(device: str) -> None:
    """kv_len == 0: out = 0, lse = -inf, whatever is in the cache."""
    inputs = attention_inputs(case("decode_attention", "empty_cache"), torch.float32)
    out, lse = run(inputs, device)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_a_chunk_that_never_ends_is_plain_rope(device: str) -> None:
    """Below chunk_len + 1 tokens, Dual Chunk positions and plain RoPE are one thing."""
    inputs = attention_inputs(case("decode_attention", "page_edges"), torch.float32)
    chunked = replace(inputs, chunk_size=160, local_size=31)
    out, lse = run(inputs, device)
    chunked_out, chunked_lse = run(chunked, device)
    # The split may follow the chunk, so the bits may differ: the budget is that of rounding.
    assert_close(chunked_out, out.double(), "attention/fp32")
    assert_close(chunked_lse, lse.double(), "lse/fp32", "lse")


def test_lse_is_optional(device: str) -> None:
    """Without lse, `out` has the same bits."""
    arguments = good_arguments("decode_attention", device)
    with_lse = arguments["out"].clone()
    decode_attention = operator("decode_attention", device)
    decode_attention(**(arguments | dict(out=with_lse)))
    decode_attention(**(arguments | dict(lse=None)))
    assert_same_bits(arguments["out"], with_lse)


def test_strides_of_small_tensors(device: str) -> None:
    """lse, block_table, lengths and scales need not be contiguous."""
    arguments = good_arguments("decode_attention", device)
    decode_attention = operator("decode_attention", device)
    decode_attention(**arguments)
    apart = arguments | dict(
        out=torch.zeros_like(arguments["out"]),
        lse=spread(torch.zeros_like(arguments["lse"])),
        block_table=spread(arguments["block_table"]),
        kv_len=spread(arguments["kv_len"]),
        logit_scale=spread(arguments["logit_scale"]),
    )
    decode_attention(**apart)
    for name in ("out", "lse"):
        assert_same_bits(apart[name], arguments[name], name)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_offsets_beyond_2_to_the_31(dtype: torch.dtype, device: str) -> None:
    """Pages and batch rows more than 2^31 elements apart (never resident as a whole)."""
    inputs = attention_inputs(case("decode_attention", "two_tokens"), dtype)
    where = torch_device(device)
    expected = run(inputs, device)
    small = inputs.cache
    pages = 2**31 // small.k_cache[0].numel() + 8
    shift = pages - len(small.k_cache)
    k_cache, v_cache = (
        torch.empty((pages, *small.k_cache.shape[1:]), dtype=dtype, device=where) for _ in range(2)
    )
    k_cache[shift:], v_cache[shift:] = small.k_cache.to(where), small.v_cache.to(where)
    shape, stride = expected[0].shape, 2**30 + 64  # 4 sequences: the last lies beyond 2^31
    q = torch.empty(4 * stride, dtype=dtype, device=where).as_strided(
        shape, (stride, 4 * 64, 64, 1)
    )
    q.copy_(inputs.q.unflatten(0, shape[:2]))
    out = torch.empty_strided(shape, q.stride(), dtype=dtype, device=where)
    lse = torch.zeros(shape[:3], device=where)
    block_table = (small.block_table.long() + shift).clamp_max(2**31 - 1).int()
    operator("decode_attention", device)(
        out,
        lse,
        q,
        k_cache,
        v_cache,
        block_table.to(where),
        inputs.kv_len.to(where),
        inputs.logit_scale.to(where),
        inputs.rope_table.to(where),
        inputs.chunk_size,
        inputs.local_size,
    )
    assert_same_bits(out.contiguous(), expected[0].contiguous())
    assert_same_bits(lse, expected[1], "lse")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(out=lambda t: t.bfloat16()), ("out", "float32", "bfloat16")),
        (dict(lse=lambda t: t.double()), ("lse", "float32", "float64")),
        (dict(out=lambda t: t[:, :, :1].expand(t.shape)), ("out", "overlap")),
        (dict(lse=lambda t: t[..., :1].expand(t.shape)), ("lse", "overlap")),
        (dict(q=lambda t: t.double()), ("q", "float32", "float64")),
        (dict(k_cache=lambda t: t.bfloat16()), ("k_cache", "float32", "bfloat16")),
        (dict(v_cache=lambda t: t.bfloat16()), ("v_cache", "float32", "bfloat16")),
        (dict(block_table=lambda t: t.long()), ("block_table", "int32", "int64")),
        (dict(kv_len=lambda t: t.int()), ("kv_len", "int64", "int32")),
        (dict(logit_scale=lambda t: t.double()), ("logit_scale", "float32", "float64")),
        (dict(rope_table=lambda t: t.double()), ("rope_table", "float32", "float64")),
        (dict(out=lambda t: t[:, :1]), ("out", "2", "1")),
        (dict(lse=lambda t: t[:, :1]), ("lse", "2", "1")),
        (dict(q=lambda t: t[0]), ("q", "[batch, q_tokens, q_heads, D]", "[2, 2, 16]")),
        (dict(q=lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)), ("q", "contiguous")),
        (dict(k_cache=lambda t: t[:, :, :64].contiguous()), ("k_cache", "128", "64")),
        (dict(v_cache=lambda t: t[:3]), ("v_cache", "4", "3")),
        (dict(kv_len=lambda t: t[:1]), ("kv_len", "2", "1")),
        (dict(block_table=lambda t: t[:1]), ("block_table", "2", "1")),
        (dict(logit_scale=lambda t: t[:1]), ("logit_scale", "batch=2", "1")),
        (dict(logit_scale=lambda t: t[:, :1]), ("logit_scale", "q_tokens=2", "1")),
        (dict(logit_scale=lambda t: t[:, 0]), ("logit_scale", "[batch, q_tokens]", "[2]")),
        (dict(kv_len=lambda t: t + torch.tensor([127, 0])), ("kv_len", "256", "257")),
        (dict(kv_len=lambda t: -t), ("kv_len", "-130")),
        (dict(block_table=lambda t: t + torch.tensor([[1, 0], [0, 0]]).int()),
         ("block_table", "4")),
        (dict(block_table=lambda t: t - torch.tensor([[0, 2], [0, 0]]).int()),
         ("block_table", "-1")),
        (dict(logit_scale=lambda t: t * 0), ("logit_scale[0, 0]", "0")),
        (dict(logit_scale=lambda t: t / torch.tensor([1, 0])), ("logit_scale[0, 1]", "inf")),
        (dict(logit_scale=lambda t: t + torch.tensor([[0], [float("nan")]])),
         ("logit_scale[1, 0]", "nan")),
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
        ops.decode_attention,
        good_arguments("decode_attention", device),
        change,
        ("decode_attention", *text),
    )
