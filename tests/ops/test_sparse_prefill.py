"""sparse_prefill against its float64 definition, against dense prefill, its bits, its refusals."""

from __future__ import annotations

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
    case,
    cases,
)
from lib.compare import assert_close, assert_same_bits
from lib.emulator import operator, torch_device
from lib.refuse import refuses
from lib.sparse import plan_of, reference_plan, run_sparse, sparse_inputs
from lib.threads import threads
from qwen1m_ext import ops
from reference import sparse as reference


def run(
    case: Case,
    inputs: AttentionInputs,
    rows: tuple[int, int] | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The op over the plan of the definition; (out, lse)."""
    plan = plan_of(*map(list, zip(*reference_plan(case), strict=True)))
    segment = case["begin"], case["end"]
    return run_sparse(inputs, plan, segment, case["tile_tokens"], rows, device=device)


def expected(case: Case, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Float64 (out, lse) over the key sets of the definition."""
    begin, end = case["begin"], case["end"]
    chunk_len = case["chunk_size"] - case["local_size"]
    lists = reference_plan(case)
    mask = torch.stack(
        [reference.key_mask(*head, begin, end, chunk_len, case["tile_tokens"]) for head in lists]
    )
    return reference.attention(
        mask, inputs.q, torch.arange(begin, end), inputs.k[0], inputs.v[0],
        inputs.logit_scale[0].item(), inputs.rope_table, inputs.chunk_size, inputs.local_size,
    )  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("sparse_prefill"))
def test_matches_definition(case: Case, dtype: str, device: str) -> None:
    """Tile, page, stage and chunk edges, GQA, empty lists, over a NaN-poisoned cache."""
    inputs = sparse_inputs(case, DTYPES[dtype])
    out, lse = run(case, inputs, device=device)
    if torch_device(device) == "cpu":
        assert_gaps_untouched(out)
    assert_attention((out, lse), expected(case, inputs), dtype, case["logit_factor"], device)


FULL_BUDGETS = [case for case in cases("sparse_prefill") if case.values[0]["end"] > 1]


@pytest.mark.isa
@pytest.mark.parametrize("by", ["diagonals", "columns"])
@pytest.mark.parametrize("case", FULL_BUDGETS)
def test_full_budgets_are_dense(case: Case, by: str) -> None:
    """All offsets, or all columns: the keys of dense prefill, and its values."""
    full = {"diagonals": ([0], [case["end"]]), "columns": ([case["end"]], [0])}[by]
    all_keys = case | dict(v_size=full[0], s_size=full[1])
    inputs = sparse_inputs(case, torch.float32)
    out, lse = run(all_keys, inputs)
    dense, dense_lse = torch.empty_like(out), torch.empty_like(lse)
    cache = inputs.cache
    ops.prefill_attention(
        dense, dense_lse, inputs.q, cache.k_cache, cache.v_cache, cache.block_table, inputs.cu_q,
        inputs.kv_len, inputs.logit_scale, inputs.rope_table, inputs.chunk_size, inputs.local_size,
    )  # fmt: skip
    assert_close(out, dense, "sparse_dense/fp32")
    assert_close(lse, dense_lse, "lse/fp32", "lse")


BITWISE_CASES = [
    "short_last_tile",
    "three_stages_clustered",
    "tile_256_three_stages",
    "gqa_7",
    "chunk_below_page",
]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", BITWISE_CASES)
def test_any_rows_of_a_segment_have_the_same_bits(
    name: str, dtype: torch.dtype, device: str
) -> None:
    """Asked for alone or together: a row sees its tile's keys, whoever else is computed."""
    it = case("sparse_prefill", name)
    inputs, begin, end = sparse_inputs(it, dtype), it["begin"], it["end"]
    together = run(it, inputs, device=device)
    if device.startswith("emu") and name == "gqa_7":
        pytest.skip("emu: a minute; the cases of other heads are enough")
    # A call of an emulated kernel takes a second for what the others do in a millisecond.
    steps = (97,) if device.startswith("emu") else (1, 17, 64, 100)
    for step in steps:
        for first in range(begin, end, 13 if step == 1 else step):
            last = min(first + step, end)
            part = run(it, inputs, (first, last), device)
            for actual, whole in zip(part, together, strict=True):
                rows = slice(first - begin, last - begin)
                assert_same_bits(actual, whole[rows], f"rows {first}..{last - 1}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    """1, 2 and 3 threads."""
    it = case("sparse_prefill", "three_stages_clustered")
    inputs = sparse_inputs(it, dtype)
    outputs = []
    for count in (1, 2, 3):
        with threads(count):
            outputs.append(run(it, inputs))
    for other in outputs[1:]:
        for actual, first in zip(other, outputs[0], strict=True):
            assert_same_bits(actual, first)


def test_lse_is_optional(device: str) -> None:
    """Without lse, `out` has the same bits."""
    call, arguments = operator("sparse_prefill", device), good_arguments("sparse_prefill", device)
    with_lse = arguments["out"].clone()
    call(**(arguments | dict(out=with_lse)))
    call(**(arguments | dict(lse=None)))
    assert_same_bits(arguments["out"], with_lse)
    assert arguments["out"].any()


def test_no_rows(device: str) -> None:
    """A call without rows writes nothing."""
    arguments = good_arguments("sparse_prefill", device)
    for name in ("out", "lse", "q"):
        arguments[name] = arguments[name][:0]
    operator("sparse_prefill", device)(**arguments)


def test_a_tile_is_not_masked_to_the_selected_pairs() -> None:
    """Offset 0 alone: the last row of a tile sees all of the tile, the first row itself."""
    it = case("sparse_prefill", "two_tiles_of_a_page") | dict(v_size=[0], s_size=[1])
    inputs = sparse_inputs(it, torch.float32)
    _, lse = run(it, inputs)
    _, same = expected(it, inputs)
    assert_close(lse, same, "lse/fp32", "lse")
    plan = plan_of([[[], [], []]] * 4, [[[], [], [(0, 1)]]] * 4)
    lists = [plan.vertical_list(0, s) for s in range(3)], [plan.run_list(0, s) for s in range(3)]
    mask = reference.key_mask(*lists, 128, 256, ops.INFINITE_CHUNK, 64)
    assert mask.sum(-1).tolist() == [*range(1, 65), *range(1, 65)]


def set_to(index: tuple[int, ...], value: int):
    """A tensor with one other element."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(out=lambda t: t.bfloat16()), ("out", "float32", "bfloat16")),
        (dict(out=lambda t: t.as_strided(t.shape, (16, 16, 1))), ("out", "overlap")),
        (dict(lse=lambda t: t[:, :1].expand(t.shape)), ("lse", "overlap")),
        (dict(lse=lambda t: t.double()), ("lse", "float32", "float64")),
        (dict(q=lambda t: t[:1]), ("out", "1", "5")),
        (dict(k_cache=lambda t: t[:, :, :64].contiguous()), ("k_cache", "128", "64")),
        (dict(v_cache=lambda t: t[:1]), ("v_cache", "2", "1")),
        (dict(block_table=lambda t: t.expand(2, -1)), ("block_table", "1", "2")),
        (dict(block_table=set_to((0, 1), 2)), ("block_table[0, 1]", "pages = 2", "2")),
        (dict(block_table=set_to((0, 0), -1)), ("block_table[0, 0]", "-1")),
        (dict(logit_scale=lambda t: t * 0), ("logit_scale[0]", "0")),
        (dict(rope_table=lambda t: t[:48]), ("rope_table", "49", "48")),
        (dict(verticals=lambda t: t.long()), ("verticals", "int32", "int64")),
        (dict(verticals=set_to((1, 0), 80)), ("verticals[1, 0]", "[0, 80)", "80")),
        (dict(verticals=set_to((0, 1), 2)), ("verticals[0, 1]", "ascending", "2")),
        (dict(verticals=set_to((0, 2), 130)), ("verticals[0, 2]", "stage 2", "130")),
        (dict(vertical_count=set_to((0, 2), 2)), ("vertical_count[0, 2]", "capacity", "2")),
        (dict(vertical_count=set_to((0, 0), -1)), ("vertical_count[0, 0]", "-1")),
        (dict(runs=lambda t: t[:, :2].contiguous()), ("runs", "3", "2")),
        (dict(runs=set_to((0, 2, 0, 1), 0)), ("runs[0, 2], run 0", "[0, 0)")),
        (dict(runs=set_to((0, 2, 0, 0), -1)), ("runs[0, 2], run 0", "[-1, 3)")),
        (dict(runs=set_to((0, 0, 1, 0), 123)), ("runs[0, 0], run 1", "64", "[123, 125)")),
        (dict(runs=set_to((0, 2, 0, 1), 131)), ("runs[0, 2], run 0", "[0, 131)")),
        (dict(run_count=set_to((0, 1), 3)), ("run_count[0, 1]", "capacity", "3")),
        (dict(scratch=lambda _: torch.zeros(2, 2, 3, 16)), ("scratch", "4", "3")),
        (dict(q_begin=lambda _: 126), ("q_begin", "5 tokens", "126")),
        (dict(q_begin=lambda _: 119), ("q_begin", "segment_begin=120", "119")),
        (dict(segment_begin=lambda _: 119), ("segment_begin", "begins at 120", "119")),
        (dict(segment_begin=lambda _: 130), ("segment_begin", "130")),
        (dict(segment_end=lambda _: 257), ("segment_end", "256", "257")),
        (dict(segment_end=lambda _: 0), ("segment_end", "0")),
        (dict(tile_tokens=lambda _: 96), ("tile_tokens", "multiple of 64", "96")),
        (dict(tile_tokens=lambda _: 576), ("tile_tokens", "512", "576")),
        (dict(tile_tokens=lambda _: 128, exact=lambda _: True), ("tile_tokens", "64", "128")),
        (dict(chunk_size=lambda _: 0), ("chunk_size", "0")),
        (dict(local_size=lambda _: 48), ("local_size", "48")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_refuses(change: dict, text: tuple[str, ...]) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    refuses(ops.sparse_prefill, good_arguments("sparse_prefill"), change, ("sparse_prefill", *text))
