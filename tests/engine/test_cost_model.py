"""The cost model against machines whose coefficients are known."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen1m_ext import demo_model_path
from qwen1m_ext.config import load_config
from qwen1m_ext.cost_model import ASSUMED_FLOPS, MAX_CHUNK_TOKENS, CostModel, Work, prefill_flops
from qwen1m_ext.prefill_policy import PrefillPolicy
from qwen1m_ext.sparse_config import (
    REPORT_FILE,
    WINDOW_TOKENS,
    ExpectedKeys,
    SparseConfig,
    SparseSettings,
)


@pytest.fixture(scope="module")
def config(checkpoint: Path):
    return load_config(checkpoint)


def machine(step, token, pair, sparse, key, decode, decode_key):
    """A machine that takes exactly these seconds."""

    def seconds(work: list[Work]) -> float:
        total = step
        for w in work:
            x = w.end - w.begin
            if w.decode:
                total += decode + decode_key * w.end
            elif w.sparse:
                total += sparse * x + key * w.end
            else:
                total += token * x + pair * (w.end**2 - w.begin**2) / 2
        return total

    return seconds


def train(model: CostModel, seconds, steps: int = 200, noise: float = 0.0) -> None:
    rng = random.Random(0)
    for _ in range(steps):
        begin = rng.choice([0, rng.randrange(0, 500_000, 128)])
        chunk = rng.choice([256, 2048, 8192, 32_768])
        keys = rng.sample(range(10, 90_000), rng.randrange(5))
        work = [Work(k, k + 1, decode=True) for k in keys]
        if rng.random() < 0.7:
            work.append(Work(begin, begin + chunk, sparse=rng.random() < 0.4))
        if work:
            model.observe(work, seconds(work) * (1 + noise * rng.uniform(-1, 1)))


FAST = (1e-3, 4e-6, 2e-10, 9e-6, 3e-9, 2e-4, 1e-8)


def test_before_any_step_it_counts_operations(config) -> None:
    model = CostModel(config)
    for begin, end in ((0, 1000), (5000, 9000)):
        want = prefill_flops(config, begin, end) / ASSUMED_FLOPS
        assert model.prefill_seconds(begin, end) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_it_learns_a_machine(config, factor: float) -> None:
    """Also one that is far from the assumed speed; with steps that scatter by a tenth."""
    seconds = machine(*(factor * c for c in FAST))
    model = CostModel(config)
    train(model, seconds, noise=0.1)
    for work in (
        [Work(0, 32_768)],
        [Work(400_000, 432_768)],
        [Work(400_000, 432_768, sparse=True)],
        [Work(k, k + 1, decode=True) for k in (100, 20_000, 80_000)],
        [Work(60_000, 60_001, decode=True), Work(200_000, 202_048)],
    ):
        assert model.seconds(work) == pytest.approx(seconds(work), rel=0.15)


def test_it_follows_a_machine_that_becomes_slower(config) -> None:
    model = CostModel(config)
    train(model, machine(*FAST))
    slow = machine(*(3 * c for c in FAST))
    train(model, slow, steps=3000)
    work = [Work(100_000, 108_192)]
    assert model.seconds(work) == pytest.approx(slow(work), rel=0.1)


def test_a_few_short_steps_scale_the_counted_proportions(config) -> None:
    """No long prompt has been seen: what it costs is not taken for nothing."""
    model = CostModel(config)
    for _ in range(4):
        model.observe([Work(0, 128)], 0.5 * prefill_flops(config, 0, 128) / ASSUMED_FLOPS)
    assert model.seconds([Work(0, 100_000)]) == pytest.approx(
        0.5 * prefill_flops(config, 0, 100_000) / ASSUMED_FLOPS, rel=0.5
    )


# Seconds of the demo model's sparse windows of 32,768 tokens, one thread, AMD Zen 5, 2026-11-30.
WINDOWS = [1.28, 1.53, 2.19, 2.47, 3.16, 3.05, 3.22, 3.66, 3.59, 3.73, 3.80, 3.49]


def test_the_first_sparse_windows_tell_what_the_rest_takes() -> None:
    """Later ones meet more keys, as budgets and their refinement let expect: no ETA is far off."""
    config = load_config(demo_model_path())
    policy = PrefillPolicy.load("sparse", Path(demo_model_path()), config, "bfloat16")
    model, total = CostModel(config, policy.expected_keys()), len(WINDOWS) * WINDOW_TOKENS
    told = []
    for i, seconds in enumerate(WINDOWS[:-1]):
        begin, end = i * WINDOW_TOKENS, (i + 1) * WINDOW_TOKENS
        model.observe([Work(begin, end, sparse=True)], seconds)
        done, left = (model.prefill_seconds(*part, True) for part in ((0, end), (end, total)))
        told.append(left * sum(WINDOWS[: i + 1]) / done / sum(WINDOWS[i + 1 :]))
    assert told[0] == pytest.approx(1, abs=0.15)
    assert min(told) > 0.6 and max(told) < 1.3, told


def test_expected_keys_are_those_that_the_refinement_measured() -> None:
    """Mean over the windows of its texts, within the local runs that every head has."""
    config = load_config(demo_model_path())
    policy = PrefillPolicy.load("sparse", Path(demo_model_path()), config, "bfloat16")
    keys = policy.expected_keys()
    report = json.loads((Path(demo_model_path()) / REPORT_FILE).read_text())
    measured = [c for layer in report["columns"] for c in layer]
    ends = [WINDOW_TOKENS * i for i in range(1, 5)]
    far = sum(s * -e * math.expm1(-y / e) for y, s in keys.far for e in ends) / len(ends)
    assert keys.near + far == pytest.approx(sum(measured) / len(measured), rel=0.01)
    parts = keys.far_pairs(0, 40_000), keys.far_pairs(40_000, 100_000)
    assert sum(parts) == pytest.approx(keys.far_pairs(0, 100_000), rel=0.05)


def test_without_a_refinement_budgets_alone_are_counted(config, tmp_path: Path) -> None:
    keys = ExpectedKeys.of(SparseConfig.default(config), SparseSettings(), tmp_path)
    assert keys.near == 1000 + 3 * 6096 and keys.far == () and keys.far_pairs(0, 10**6) == 0
    (tmp_path / REPORT_FILE).write_text('{"columns": [[1.0]], "texts": []}')
    assert ExpectedKeys.of(SparseConfig.default(config), SparseSettings(), tmp_path) == keys


@settings(max_examples=60)
@given(
    begin=st.integers(0, 1_000_000),
    seconds=st.floats(1e-4, 1e4),
    sparse=st.booleans(),
    trained=st.booleans(),
)
def test_the_chunk_is_the_largest_that_fits(config, begin, seconds, sparse, trained) -> None:
    model = CostModel(config)
    if trained:
        train(model, machine(*FAST), steps=20)
    tokens = model.chunk(begin, seconds, sparse)
    slack = 1 + 1e-6
    if tokens:
        assert model.prefill_seconds(begin, begin + tokens, sparse) <= seconds * slack
    if tokens < MAX_CHUNK_TOKENS:
        assert model.prefill_seconds(begin, begin + tokens + 1, sparse) * slack >= seconds


def capped_steps(model: CostModel, slowdown, steps: int, cap: float = 0.25) -> list[float]:
    """Seconds of a prefill's steps beside a decode, planned one ahead for a cap, on `FAST`.

    `slowdown(i)`: factor on the time of step i.
    """
    seconds, begin, taken = machine(*FAST), 20_000, []
    planned: list[list[Work]] = []
    for i in range(steps + 1):
        decode = Work(5000 + i, 5001 + i, decode=True)
        room = cap / model.lateness - model.seconds([decode])
        tokens = max(128, model.chunk(begin, room))
        planned.append([decode, Work(begin, begin + tokens)])
        begin = 20_000 + (begin + tokens) % 100_000
        if i:  # the step before runs while this one is planned
            taken.append(seconds(planned[i - 1]) * slowdown(i - 1))
            model.observe(planned[i - 1], taken[-1])
    return taken


def test_a_cap_holds_for_nineteen_steps_in_twenty(config) -> None:
    """Also where steps scatter by a tenth and are later than the fit believes."""
    rng = random.Random(1)
    model = CostModel(config)
    train(model, machine(*FAST))
    taken = capped_steps(model, lambda i: 1.08 * math.exp(rng.gauss(0, 0.1)), 1000)
    over = sum(t > 0.25 for t in taken[100:]) / 900
    assert over <= 0.06
    assert sorted(taken)[500] > 0.18, "a cap is no reason to idle"


def test_a_machine_that_becomes_busy_is_noticed_within_a_few_steps(config) -> None:
    """Another process takes a core for 200 steps, and gives it back."""
    model = CostModel(config)
    train(model, machine(*FAST))
    taken = capped_steps(model, lambda i: 2.0 if 100 <= i < 300 else 1.0, 500)
    over = [i for i, t in enumerate(taken) if t > 0.2501]
    assert over and min(over) == 100 and max(over) <= 104
    assert taken[299] > 0.2, "the whole cap is used while it is busy"
    assert taken[-1] > 0.2, "and afterwards"


def test_windows_of_sparse_prefill_do_not_make_others_late(config) -> None:
    model = CostModel(config)
    train(model, machine(*FAST))
    before = model.lateness
    for _ in range(10):
        model.observe([Work(65_536, 98_304, sparse=True)], 100.0)
    assert model.lateness == before


def test_no_cap_means_any_chunk(config) -> None:
    assert CostModel(config).chunk(0, math.inf) > 1_010_000


def test_nonsense_is_not_learnt(config) -> None:
    model = CostModel(config)
    before = model.seconds([Work(0, 1000)])
    model.observe([Work(0, 1000)], 0.0)
    assert model.steps == 0 and model.seconds([Work(0, 1000)]) == before
