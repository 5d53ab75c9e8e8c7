"""qkv_rope_append against its float64 definition, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.arguments import good_arguments
from lib.cases import DTYPES, PAGE_SIZE, SEEDS, THETA, Case, case, cases, spread, strided
from lib.compare import assert_close, assert_same_bits
from lib.emulator import operator, torch_device
from lib.generator import shuffled, tensor
from lib.refuse import refuses
from lib.threads import threads
from qwen1m_ext import ops
from reference.fp8 import quantise
from reference.qkv_rope_append import qkv_rope_append as reference
from reference.rope import rope_table


def arguments_of(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a case: NaN-filled outputs, slots in shuffled order over shuffled pages."""
    tokens, heads, kv_heads = case["tokens"], case["q_heads"], case["kv_heads"]
    dim, chunk_len = case["head_dim"], case["chunk_len"]
    columns = (heads + 2 * kv_heads) * dim
    pages = -(-tokens // PAGE_SIZE) + 2
    slots = torch.tensor(shuffled(SEEDS["pages"], pages * PAGE_SIZE)[:tokens], dtype=torch.int64)
    if case["skip_every"]:
        slots[:: case["skip_every"]] = -1
    positions = case["first_position"] + case["position_step"] * torch.arange(tokens)
    rows = min(chunk_len, int(positions.max()) + 1 if tokens else 1)
    cache = torch.full((pages, kv_heads, PAGE_SIZE, dim), float("nan"), dtype=dtype)
    return dict(
        q=torch.full((tokens, heads, dim), float("nan"), dtype=dtype),
        k_cache=cache.clone(),
        v_cache=cache,
        qkv=strided(tensor(SEEDS["qkv"], tokens, columns, dtype=dtype), case["row_stride"]),
        bias=tensor(SEEDS["bias"], columns, dtype=dtype) if case["bias"] else None,
        positions=positions,
        slot_mapping=slots,
        rope_table=rope_table(THETA, dim, rows).float(),
        chunk_len=chunk_len,
    )


def run(arguments: dict[str, Any], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Call the op on a device; returns q, k_cache, v_cache there."""
    where = torch_device(device)
    on = {
        name: value.to(where) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    operator("qkv_rope_append", device)(**on)
    return on["q"], on["k_cache"], on["v_cache"]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("qkv_rope_append"))
def test_matches_definition(case: Case, dtype: str, device: str) -> None:
    """Page and chunk edges, GQA ratios, skipped slots; rows nobody asked for stay NaN.

    On a GPU the bits are those of the CPU.
    """
    arguments = arguments_of(case, DTYPES[dtype])
    inputs = {name: value for name, value in arguments.items() if name != "q"}
    expected = reference(case["q_heads"], **inputs)
    names = ("q", "k_cache", "v_cache")
    actual = run(arguments, device)
    for name, got, value in zip(names, actual, expected, strict=True):
        assert_close(got, value, f"qkv_rope_append/{dtype}", name)
    if device != "cpu":
        on_cpu = run(arguments_of(case, DTYPES[dtype]))
        for name, got, value in zip(names, actual, on_cpu, strict=True):
            assert_same_bits(got.cpu().nan_to_num(), value.nan_to_num(), name)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_plain_rope_and_one_chunk_give_the_same_bits(dtype: torch.dtype, device: str) -> None:
    """Inside chunk 0 the chunk length does not matter."""
    arguments = arguments_of(case("qkv_rope_append", "page_plus_1"), dtype)
    plain = run(arguments, device)
    arguments = arguments_of(case("qkv_rope_append", "page_plus_1"), dtype)
    for actual, expected in zip(run(arguments | dict(chunk_len=129), device), plain, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_token_does_not_depend_on_other_tokens(dtype: torch.dtype, device: str) -> None:
    """One call, a call per token, 1 or 2 threads: the same bits."""
    case_ = case("qkv_rope_append", "chunk_border")
    together = run(arguments_of(case_, dtype), device)
    alone = arguments_of(case_, dtype)
    for token in range(case_["tokens"]):
        one = slice(token, token + 1)
        per_token = {name: alone[name][one] for name in ("q", "qkv", "positions", "slot_mapping")}
        _, k_cache, v_cache = run(alone | per_token, device)
        alone |= dict(k_cache=k_cache, v_cache=v_cache)
    for actual, expected in zip((alone["k_cache"], alone["v_cache"]), together[1:], strict=True):
        assert_same_bits(actual, expected)
    for count in (1, 2):
        with threads(count):
            outputs = run(arguments_of(case_, dtype), device)
        for actual, expected in zip(outputs, together, strict=True):
            assert_same_bits(actual, expected, f"{count} threads")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strides_of_index_tensors(dtype: torch.dtype, device: str) -> None:
    """Positions and slot_mapping need not be contiguous."""
    case_ = case("qkv_rope_append", "chunk_border")
    expected = run(arguments_of(case_, dtype), device)
    arguments = arguments_of(case_, dtype)
    for name in ("positions", "slot_mapping"):
        arguments[name] = spread(arguments[name])
    for actual, value in zip(run(arguments, device), expected, strict=True):
        assert_same_bits(actual, value)


def test_values_that_a_gpu_cannot_refuse(device: str) -> None:
    """There a slot outside of the cache appends nothing; a position without rotation gives NaN."""
    if device == "cpu":
        pytest.skip("cpu: refused (test_refuses)")
    arguments = arguments_of(case("qkv_rope_append", "chunk_border"), torch.bfloat16)
    q, k_cache, v_cache = run(arguments, device)
    slots = len(arguments["k_cache"]) * PAGE_SIZE
    lost, bad = {3: -7, 4: slots, 5: 2**40}, {7: -1, 8: arguments["chunk_len"] - 1}
    changed = arguments | dict(
        positions=arguments["positions"].clone(),
        slot_mapping=arguments["slot_mapping"].clone(),
        rope_table=arguments["rope_table"][: arguments["chunk_len"] - 1],
    )
    for token, value in lost.items():
        changed["slot_mapping"][token] = value
    for token, value in bad.items():
        changed["positions"][token] = value
    for token in range(case("qkv_rope_append", "chunk_border")["tokens"]):
        page, row = divmod(int(arguments["slot_mapping"][token]), PAGE_SIZE)
        no_rotation = int(changed["positions"][token]) % changed["chunk_len"] == 223
        if token in lost or token in bad or no_rotation:
            k_cache[page, :, row] = float("nan")
        if token in lost:
            v_cache[page, :, row] = float("nan")
    for actual, expected in zip(run(changed, device), (q, k_cache, v_cache), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert_same_bits(actual.nan_to_num(), expected.nan_to_num())


def test_large_bias_keeps_fp32_precision(device: str) -> None:
    """Qwen2.5's K bias reaches about 300: bias and rotation in fp32, one rounding to bf16."""
    arguments = arguments_of(case("qkv_rope_append", "gqa_7"), torch.bfloat16)
    arguments["bias"] *= 200
    inputs = {name: value for name, value in arguments.items() if name != "q"}
    expected = reference(7, **inputs)
    actual = run(arguments, device)
    for got, value in zip(actual, expected, strict=True):
        # A rotation may cancel, so the error is measured against the size of the rotated pair:
        # |value| <= 600, half a unit in the last place of bf16 is 2^-9 of it at most.
        limit = value.abs().nan_to_num() * 2.0**-8 + 600 * 2.0**-20
        assert ((got.cpu().double() - value).abs().nan_to_num() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_offsets_beyond_2_to_the_31(dtype: torch.dtype, device: str) -> None:
    """Slots in the last page of caches of more than 2^31 elements (never resident as a whole)."""
    arguments = arguments_of(case("qkv_rope_append", "strided_rows_of_vectors"), dtype)
    where = torch_device(device)
    pages = 2**31 // (2 * PAGE_SIZE * 64) + 2
    shape = (pages, 2, PAGE_SIZE, 64)
    small = run(arguments, device)
    shift = (pages - len(arguments["k_cache"])) * PAGE_SIZE
    big = arguments | dict(
        k_cache=torch.empty(shape, dtype=dtype, device=where),
        v_cache=torch.empty(shape, dtype=dtype, device=where),
        slot_mapping=arguments["slot_mapping"] + shift,
    )
    _, k_cache, v_cache = run(big, device)
    for token, slot in enumerate(arguments["slot_mapping"].tolist()):
        page, row = divmod(slot, PAGE_SIZE)
        for actual, expected in ((k_cache, small[1]), (v_cache, small[2])):
            written = actual[page + shift // PAGE_SIZE, :, row]
            assert_same_bits(written, expected[page, :, row], f"token {token}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(q=lambda t: t.bfloat16()), ("q", "float32", "bfloat16")),
        (dict(k_cache=lambda t: t.bfloat16()), ("k_cache", "float32", "bfloat16")),
        (dict(v_cache=lambda t: t.bfloat16()), ("v_cache", "float32", "bfloat16")),
        (dict(bias=lambda t: t.bfloat16()), ("bias", "float32", "bfloat16")),
        (dict(qkv=lambda t: t.double()), ("qkv", "float32", "float64")),
        (dict(positions=lambda t: t.int()), ("positions", "int64", "int32")),
        (dict(slot_mapping=lambda t: t.int()), ("slot_mapping", "int64", "int32")),
        (dict(rope_table=lambda t: t.double()), ("rope_table", "float32", "float64")),
        (dict(rope_table=lambda t: t.bfloat16()), ("rope_table", "float32", "bfloat16")),
        (dict(q=lambda t: t[:2]), ("qkv", "tokens=2", "[3, 64]")),
        (dict(q=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)), ("q", "contiguous")),
        (dict(qkv=lambda t: t[:, :63]), ("qkv", "64", "63")),
        (dict(qkv=lambda t: t.t().contiguous().t()), ("qkv", "contiguous")),
        (dict(bias=lambda t: t[:63]), ("bias", "64", "63")),
        (dict(positions=lambda t: t[:2]), ("positions", "3", "2")),
        (dict(slot_mapping=lambda t: t[:2]), ("slot_mapping", "3", "2")),
        (dict(k_cache=lambda t: t[:, :, :64].contiguous()), ("k_cache", "128", "64")),
        (dict(k_cache=lambda t: t[..., :8].contiguous()), ("k_cache", "16", "8")),
        (dict(v_cache=lambda t: t[:1]), ("v_cache", "2", "1")),
        (dict(v_cache=lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
         ("v_cache", "contiguous")),
        (dict(rope_table=lambda t: t[:, :7].contiguous()), ("rope_table", "8", "7")),
        (dict(rope_table=lambda t: t[:39]), ("position", "39")),
        (dict(positions=lambda t: t - 38), ("position", "-1")),
        (dict(slot_mapping=lambda t: t + 1), ("slot_mapping", "256")),
        (dict(slot_mapping=lambda t: t - 256), ("slot_mapping", "-2")),
        (dict(chunk_len=lambda _: 0), ("chunk_len", "> 0", "0")),
        (dict(chunk_len=lambda _: -5), ("chunk_len", "> 0", "-5")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_refuses(change: dict, text: tuple[str, ...], device: str) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    refuses(
        ops.qkv_rope_append,
        good_arguments("qkv_rope_append", device),
        change,
        ("qkv_rope_append", *text),
    )


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["chunk_border", "strided_rows", "gqa_7", "skipped_slots"])
def test_fp8_cache_holds_the_rounded_values(name: str, dtype: torch.dtype, device: str) -> None:
    """Bit for bit e4m3 of the fp32 value over the head's scale, beyond 448 too; q as ever."""
    arguments = arguments_of(case("qkv_rope_append", name), dtype)
    expected_q = run(arguments, device)[0].cpu()
    wide = {x: arguments[x].float() for x in ("q", "k_cache", "v_cache", "qkv", "bias")}
    _, keys, values = run(arguments | wide)
    heads = keys.shape[1]
    k_scale, v_scale = 0.004 * torch.arange(1.0, heads + 1), 0.005 / torch.arange(1.0, heads + 1)
    k_cache, v_cache = (
        torch.full(keys.shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn) for _ in range(2)
    )  # NaN
    arguments |= dict(
        q=torch.empty_like(expected_q), k_cache=k_cache, v_cache=v_cache, k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    q, k_cache, v_cache = (x.cpu() for x in run(arguments, device))
    assert_same_bits(q, expected_q, "q")
    for cache, fp32, scale in ((k_cache, keys, k_scale), (v_cache, values, v_scale)):
        expected = quantise(fp32, scale[:, None, None])
        written = ~fp32.isnan()
        assert written.any() and (expected[written].float().abs() == 448).any()
        assert torch.equal(cache.view(torch.uint8)[written], expected.view(torch.uint8)[written])
        assert (cache.view(torch.uint8)[~written] == 0x7F).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(k_scale=lambda _: torch.ones(1)), ("v_scale", "none")),
        (dict(v_scale=lambda _: torch.ones(1)), ("k_scale", "none")),
        (dict(k_scale=lambda _: torch.ones(1), v_scale=lambda _: torch.ones(1)),
         ("k_cache", "float8_e4m3fn", "float32")),
        (dict(k_cache=lambda t: t.to(torch.float8_e4m3fn)), ("k_cache", "float32")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_fp8_refuses(change: dict, text: tuple[str, ...]) -> None:
    """Scales mean an fp8 cache, and both of them."""
    arguments = good_arguments("qkv_rope_append")
    refuses(ops.qkv_rope_append, arguments, change, ("qkv_rope_append", *text))
