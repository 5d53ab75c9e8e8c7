"""sparse_plan: the lists of the definition, ties, groups, and its refusals."""

from __future__ import annotations

import pytest
import torch

from lib.arguments import good_arguments
from lib.cases import Case, case, cases
from lib.compare import assert_same_bits
from lib.generator import tensor
from lib.refuse import refuses
from lib.sparse import Plan, budgets, make_plan, reference_plan, scores
from lib.threads import threads
from qwen1m_ext import ops
from reference import sparse as reference


def plan_case(case: Case, group: int = 1, device: str = "cpu", **switches: bool) -> Plan:
    """The op on a sparse_prefill case."""
    return make_plan(
        *scores(case), *budgets(case), case["begin"], case["chunk_size"], case["local_size"],
        case["tile_tokens"], group, device=device, **switches,
    )  # fmt: skip


def assert_lists(plan: Plan, expected: list[tuple[list, list]]) -> None:
    """The same lists, head by head and stage by stage."""
    for head, (verticals, runs) in enumerate(expected):
        for stage in range(3):
            where = f"head {head}, stage {stage}"
            assert plan.vertical_list(head, stage) == verticals[stage], where
            assert plan.run_list(head, stage) == runs[stage], where


@pytest.mark.parametrize(
    "switches",
    [{}, {"exact": True}, {"fallback": True}, {"exact": True, "fallback": True}],
    ids=["runs", "exact", "fallback", "exact_fallback"],
)
@pytest.mark.parametrize("case", cases("sparse_prefill"))
def test_matches_definition(case: Case, switches: dict[str, bool], device: str) -> None:
    """Budgets, forced entries, ties, stage borders, joined runs, empty stages."""
    if device.startswith("emu") and len(switches) == 1:
        pytest.skip("emu: none and both of the switches are enough")
    assert_lists(plan_case(case, device=device, **switches), reference_plan(case, **switches))


def test_the_forced_columns_and_diagonals() -> None:
    """The first 30 keys and the nearest 100 diagonals come first, whatever their score."""
    low = torch.arange(1000.0).expand(2, -1).contiguous()  # the last are the best
    plan = make_plan(low, low, [30, 31], [100, 99], 500, ops.INFINITE_CHUNK, 0, 64)
    assert plan.vertical_list(0, 2) == list(range(30))
    assert plan.vertical_list(1, 2) == [*range(30), 999]
    assert plan.run_list(0, 2) == [(0, 100)]
    assert plan.run_list(1, 2) == [(0, 99)]


def test_scores_of_every_kind(device: str) -> None:
    """Negative ones, zeros of both signs, infinities, denormals: the order of numbers."""
    special = torch.tensor([-1.0, 0.0, -0.0, 1e-40, -1e-40, torch.inf, -torch.inf, 3.5, -2.0])
    score = torch.cat([torch.full((30,), -9.0), special])[None]
    order = [35, 37, 33, 31, 32, 34, 30, 38, 36]  # +inf, 3.5, denormal, 0, -0, ...
    slash = torch.zeros_like(score)
    for count in range(len(order) + 1):
        plan = make_plan(
            score, slash, [30 + count], [0], 0, ops.INFINITE_CHUNK, 0, 64, device=device
        )
        assert plan.vertical_list(0, 2) == [*range(30), *sorted(order[:count])]


@pytest.mark.parametrize("seed", range(3))
def test_many_scores_with_ties(seed: int) -> None:
    """50,000 scores of few values: the lower index wins."""
    values = (tensor(seed, 1, 50_000) * 20).round() / 7
    for size in (0, 1, 100, 777, 25_000, 49_999, 50_000):
        plan = make_plan(values, values, [size], [size], 40_000, ops.INFINITE_CHUNK, 0, 128)
        chosen = reference.select(values[0], size, reference.FORCED_VERTICALS)
        assert plan.vertical_list(0, 2) == chosen
        offsets = reference.select(values[0], size, reference.FORCED_SLASHES)
        assert plan.run_list(0, 2) == reference.merged(offsets, 128)


@pytest.mark.parametrize("group", [2, 4])
def test_a_group_shares_one_selection(group: int, device: str) -> None:
    """Summed scores and the largest budgets, for every head of the group."""
    it = case("sparse_prefill", "three_stages_clustered")
    vertical, slash = scores(it)
    v_size, s_size = budgets(it)
    chunk_len = it["chunk_size"] - it["local_size"]
    expected = []
    for first in range(0, it["q_heads"], group):
        heads = slice(first, first + group)
        total = [sum(x[heads].unbind()) for x in (vertical, slash)]  # in order, as the op does
        sizes = max(v_size[heads]), max(s_size[heads])
        lists = reference.plan(*total, *sizes, it["begin"], chunk_len, it["tile_tokens"])
        expected += [lists] * group
    assert_lists(plan_case(it, group, device), expected)


def test_capacities_are_enough_and_not_too_much(device: str) -> None:
    """The worst case fits: single diagonals exactly as far apart as runs can be."""
    end, tile = 1300, 64
    slash = torch.zeros(1, end)
    far = torch.arange(100 + tile, end, tile + 1)
    slash[0, far] = 1.0
    plan = make_plan(
        slash, slash, [end], [100 + len(far)], 1200, ops.INFINITE_CHUNK, 0, tile, device=device
    )
    assert int(plan.run_count[0, 2]) == 1 + len(far)
    assert plan.runs.shape[2] - int(plan.run_count[0, 2]) <= 2


def test_threads_do_not_change_bits() -> None:
    """1 and 3 threads."""
    plans = []
    for count in (1, 3):
        with threads(count):
            plans.append(plan_case(case("sparse_prefill", "gqa_7")))
    for first, other in zip(*(plan.tensors() for plan in plans), strict=True):
        assert_same_bits(first, other)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(verticals=lambda t: t.long()), ("verticals", "int32", "int64")),
        (dict(verticals=lambda t: t[:, :10].contiguous()),
         ("verticals", "20", "v_size[0]=5", "10")),
        (dict(verticals=lambda t: t.T.contiguous().T), ("verticals", "contiguous")),
        (dict(vertical_count=lambda t: t[:, :2].contiguous()), ("vertical_count", "3", "2")),
        (dict(runs=lambda t: t[:, :, :1].contiguous()), ("runs", "5", "s_size[0]=6", "1")),
        (dict(run_count=lambda t: t[:1]), ("run_count", "2", "1")),
        (dict(vertical_score=lambda t: t.double()), ("vertical_score", "float32", "float64")),
        (dict(slash_score=lambda t: t[:, :-1].contiguous()), ("slash_score", "130", "129")),
        (dict(v_size=lambda t: t.int()), ("v_size", "int64", "int32")),
        (dict(v_size=lambda t: -t), ("v_size[0]", "-5")),
        (dict(s_size=lambda t: t[:1]), ("s_size", "2", "1")),
        (dict(s_size=lambda t: -t), ("s_size[0]", "-6")),
        (dict(segment_begin=lambda _: 130), ("segment_begin", "130")),
        (dict(segment_begin=lambda _: -1), ("segment_begin", "-1")),
        (dict(segment_begin=lambda _: 119), ("segment_begin", "120", "119")),
        (dict(tile_tokens=lambda _: 0), ("tile_tokens", "0")),
        (dict(group=lambda _: 3), ("group", "q_heads=2", "3")),
        (dict(group=lambda _: 0), ("group", "0")),
        (dict(chunk_size=lambda _: 0), ("chunk_size", "0")),
        (dict(local_size=lambda _: 48), ("local_size", "48")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else None,
)  # fmt: skip
def test_refuses(change: dict, text: tuple[str, ...]) -> None:
    """The error names the argument, the expectation and the value; nothing is written."""
    refuses(ops.sparse_plan, good_arguments("sparse_plan"), change, ("sparse_plan", *text))


def test_nothing_is_written_beyond_the_count(device: str) -> None:
    """The rest of the lists stays as it was."""
    score = tensor(5, 1, 400).abs()
    plan = make_plan(score, score, [40], [120], 300, ops.INFINITE_CHUNK, 0, 64, device=device)
    assert (plan.verticals[0, 40:] == -7).all()
