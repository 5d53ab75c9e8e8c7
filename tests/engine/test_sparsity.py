"""Sparse prefill in the engine: windows, full budgets, chunking, sessions, recall, refusals."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.checkpoints import model_config, write_checkpoint
from lib.hold import PATIENCE, held, together
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.config import DualChunkConfig
from qwen1m_ext.cost_model import CostModel, prefill_flops
from qwen1m_ext.errors import ConfigError, RequestError
from qwen1m_ext.events import Progress
from qwen1m_ext.request import RequestOutput
from qwen1m_ext.sequence import AttentionPolicy
from qwen1m_ext.sparse_config import (
    FILE_NAME,
    ExpectedKeys,
    HeadBudget,
    SparseConfig,
    SparseSettings,
)
from qwen1m_ext.sparsity import SELECTING_ROWS, WindowGrid, score_bytes

WINDOW = 192  # four chunks of 48 tokens
SETTINGS = SparseSettings(tile_tokens=64, window_tokens=WINDOW)
SMALL = (60, 120)  # of them 30 columns and 100 diagonals are forced
PROMPT = 700


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that three are sparse, with small budgets beside the checkpoint."""
    directory = tmp_path_factory.mktemp("deep")
    write_checkpoint(directory, model_config(num_hidden_layers=4), gain=2.0)
    layer = (HeadBudget(*SMALL, 0.5),) * 4
    SparseConfig((layer,) * 4, "").save(directory / FILE_NAME)
    return directory


def load(directory: Path, **options: Any) -> LLM:
    defaults = {"max_model_len": 1024, "sparse_settings": SETTINGS}
    return LLM(directory, **(defaults | options))


@pytest.fixture(scope="module")
def sparse(deep: Path) -> LLM:
    return load(deep, attention="sparse", max_model_len=2048)


def run(llm: LLM, ids: list[int], **params: Any) -> RequestOutput:
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, **params)
    return llm.generate({"prompt_token_ids": ids}, sampling)[0]


def same(a: RequestOutput, b: RequestOutput, tolerance: float) -> None:
    """Equal tokens, log probabilities within a tolerance."""
    assert a.outputs[0].token_ids == b.outputs[0].token_ids
    for x, y in zip(a.outputs[0].logprobs or [], b.outputs[0].logprobs or [], strict=True):
        assert x.keys() == y.keys()
        assert all(abs(x[t].logprob - y[t].logprob) <= tolerance for t in x)


@given(
    st.integers(1, 400), st.integers(1, 400), st.integers(0, 3000), st.integers(1, 3000),
    st.integers(1, 900),
)  # fmt: skip
def test_windows_and_segments_tile_the_prompt(
    chunk_len: int, window: int, begin: int, count: int, limit: int
) -> None:
    grid = WindowGrid(DualChunkConfig(chunk_len, 0, None), window)
    policy = AttentionPolicy("sparse", window, grid.border)
    begin, total = policy.last_stop(begin), begin + count
    reached = begin
    for low, high in grid.windows(begin, total):
        assert low == reached < high <= grid.window_end(low)
        segments = list(grid.segments(low, high))
        assert segments[0][0] == low and segments[-1][1] == high
        assert all(a[1] == b[0] for a, b in zip(segments, segments[1:], strict=False))
        assert all((e - 1) // chunk_len == b // chunk_len for b, e in segments)
        rows = min(SELECTING_ROWS, high - low, (high - 1) % chunk_len + 1)
        assert rows == min(SELECTING_ROWS, high - low) or chunk_len < SELECTING_ROWS
        reached = high
    assert reached == total
    # chunks of any size end at window borders, so the windows are those of the whole prompt
    pieces, at = [], begin
    while at < total:
        end = policy.chunk_end(at, at + limit, total)
        assert at < end <= max(at + limit, grid.window_end(at))
        pieces += list(grid.windows(at, end))
        at = end
    assert pieces == list(grid.windows(begin, total))


def test_windows_of_the_published_models() -> None:
    """The grid of 32,768 tokens, cut at the borders of the DCA chunks of 253,952 tokens."""
    grid = WindowGrid(DualChunkConfig(262_144, 8_192, 262_144))
    windows = list(grid.windows(229_376, 300_000))
    assert windows == [(229_376, 253_952), (253_952, 262_144), (262_144, 294_912),
                       (294_912, 300_000)]  # fmt: skip
    assert all(list(grid.segments(*window)) == [window] for window in windows)


def test_a_few_rows_beyond_a_border_select_for_themselves_alone() -> None:
    grid = WindowGrid(DualChunkConfig(1024, 512, 2048))
    assert list(grid.windows(0, 5000)) == [(0, 5000)]
    assert list(grid.windows(0, 5150)) == [(0, 5120), (5120, 5150)]
    assert list(grid.windows(0, 5120 + SELECTING_ROWS)) == [(0, 5120 + SELECTING_ROWS)]


def test_full_budgets_are_dense(deep: Path, tmp_path: Path) -> None:
    layer = (HeadBudget(1 << 20, 1 << 20, 1.0),) * 4
    SparseConfig((layer,) * 4, "").save(tmp_path / "full.json")
    llm = load(deep, attention="auto", sparse_config=tmp_path / "full.json")
    for length in (1, 2, 47, 64, WINDOW, WINDOW + 1, PROMPT):
        dense = run(llm, prompt_ids(length), attention="dense")
        full = run(llm, prompt_ids(length), attention="sparse")
        assert full.metrics.sparse and not dense.metrics.sparse
        same(dense, full, 1e-3)
        assert full.metrics.recall == pytest.approx(1.0, abs=1e-5)
        assert dense.metrics.recall is None


def test_small_budgets_change_the_result_and_show_in_the_recall(sparse: LLM) -> None:
    prompt = prompt_ids(PROMPT)
    output = run(sparse, prompt)
    dense = run(sparse, prompt, attention="dense")
    assert output.metrics.recall is not None and 0.05 < output.metrics.recall < 0.99
    assert output.outputs[0].logprobs != dense.outputs[0].logprobs


@pytest.mark.parametrize("settings", [
    SETTINGS,
    SparseSettings("real", False, 64, WINDOW),
    SparseSettings("critical", True, 128, WINDOW),
])  # fmt: skip
def test_results_do_not_depend_on_the_chunk_size(deep: Path, settings: SparseSettings) -> None:
    outputs = [
        run(load(deep, attention="sparse", sparse_settings=settings, prefill_chunk_tokens=n),
            prompt_ids(PROMPT))
        for n in (WINDOW, WINDOW + 5, 2 * WINDOW, 1024)
    ]  # fmt: skip
    for output in outputs[1:]:
        same(outputs[0], output, 1e-5)
        assert output.metrics.recall == pytest.approx(outputs[0].metrics.recall, abs=1e-6)


def test_the_switches_change_the_selection(deep: Path) -> None:
    recalls = {
        run(load(deep, attention="sparse", sparse_settings=settings), prompt_ids(PROMPT))
        .metrics.recall
        for settings in (
            SETTINGS,
            SparseSettings("real", False, 64, WINDOW),
            SparseSettings("critical", True, 64, WINDOW),
        )
    }  # fmt: skip
    assert len(recalls) == 3


def test_the_last_layer_is_dense(deep: Path, tmp_path: Path) -> None:
    """Its budgets are never read; with prompt_logprobs all its rows run, and nothing changes."""
    full, none = HeadBudget(1 << 20, 1 << 20, 1.0), HeadBudget(1, 1, 0.0)
    layers = ((full,) * 4,) * 3 + ((none,) * 4,)
    SparseConfig(layers, "").save(tmp_path / "last.json")
    llm = load(deep, attention="sparse", sparse_config=tmp_path / "last.json")
    same(run(llm, prompt_ids(PROMPT)), run(llm, prompt_ids(PROMPT), attention="dense"), 1e-3)
    scored = run(llm, prompt_ids(PROMPT), prompt_logprobs=0)
    same(run(llm, prompt_ids(PROMPT)), scored, 1e-3)


def test_a_session_reuses_whole_windows_of_a_sparse_prompt(deep: Path) -> None:
    llm = load(deep, attention="sparse", max_model_len=2048, enable_prefix_caching=False)
    session = llm.open_session()
    prompt = prompt_ids(PROMPT)

    def turn(ids: list[int], **changes: Any) -> RequestOutput:
        params = SamplingParams(
            temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, **changes
        )  # fmt: skip
        *_, output = llm.stream({"prompt_token_ids": ids}, params, session=session)
        return output

    first = turn(prompt)
    assert first.metrics.cached_tokens == 0
    again = turn(prompt)  # the same length, so the same temperature
    assert again.metrics.cached_tokens == PROMPT // WINDOW * WINDOW
    same(first, again, 1e-5)
    dense = turn(prompt, attention="dense")
    assert dense.metrics.cached_tokens == 0 and not dense.metrics.sparse
    assert turn(prompt).metrics.cached_tokens == 0
    other = prompt[:500] + [1] * (PROMPT - 500)
    assert turn(other).metrics.cached_tokens == 2 * WINDOW
    same(turn(other), run(llm, other), 1e-5)
    session.close()
    assert llm.engine.cache.allocator.num_free == llm.engine.cache.num_pages


def test_cached_prefixes_are_those_of_the_same_attention(deep: Path) -> None:
    """Windows of 256 tokens are two pages; dense and sparse, or two budgets, share nothing."""
    settings = SparseSettings(tile_tokens=64, window_tokens=256)
    llm = load(deep, attention="sparse", sparse_settings=settings)
    fresh, cached = (run(llm, prompt_ids(PROMPT)) for _ in range(2))
    assert fresh.metrics.cached_tokens == 0 and cached.metrics.cached_tokens == 512
    same(fresh, cached, 1e-5)
    assert run(llm, prompt_ids(PROMPT), attention="dense").metrics.cached_tokens == 0
    assert llm.engine.sparse is not None
    keys = {load(deep, attention="sparse", sparse_settings=s).engine.sparse.key for s in (
        settings, SETTINGS, SparseSettings("real", False, 64, 256))}  # type: ignore[union-attr]  # fmt: skip
    assert len(keys) == 3 and llm.engine.sparse.key in keys


def test_sparse_and_dense_prompts_run_in_one_batch(deep: Path) -> None:
    """Chunks of both kinds, in both orders, beside sequences that decode."""
    llm = load(deep, attention="sparse", max_model_len=4096, enable_prefix_caching=False)
    prompts = [prompt_ids(n, seed=n) for n in (150, 301, 90, 420, 20)]
    kinds = ["dense", "sparse", "dense", "sparse", "sparse"]
    params = [
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, attention=kind)
        for kind in kinds
    ]  # fmt: skip
    with together(llm.engine, len(prompts)):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    for output, prompt, kind in zip(outputs, prompts, kinds, strict=True):
        same(output, run(llm, prompt, attention=kind), 1e-3)
        assert output.metrics.sparse == (kind == "sparse")


def test_sparse_results_do_not_depend_on_the_load(deep: Path) -> None:
    """Under a latency cap, beside others, preempted, sampled three times, cancelled and resumed."""
    alone = load(deep, attention="sparse", max_model_len=2048, enable_prefix_caching=False)
    busy = load(
        deep, attention="sparse", max_model_len=1536, prefill_chunk_tokens=200,
        max_itl_ms=0.01, max_chunk_ms=0.01,
    ).engine  # fmt: skip
    plan = [
        (prompt_ids(length, seed), SamplingParams(
            temperature=0 if n == 1 else 1, seed=seed, n=n, max_tokens=tokens, ignore_eos=True,
            attention=attention,
        ))
        for seed, (length, n, tokens, attention) in enumerate(
            [(700, 1, 60, "sparse"),
             # six that begin together in all 12 pages and want 18 at their end
             *((130 + i, 1, 140, "dense" if i == 2 else "sparse") for i in range(6)),
             (450, 3, 20, "sparse"), (500, 1, 40, "dense"), (650, 1, 80, "sparse")]
        )
    ]  # fmt: skip
    reached, stopped = threading.Event(), threading.Event()

    def wait_at_400(progress: Progress) -> None:
        if progress.done >= 400:
            reached.set()
            assert stopped.wait(PATIENCE)

    cancelled = busy.submit(*plan[0], on_progress=wait_at_400)
    assert reached.wait(PATIENCE)
    cancelled.cancel()
    stopped.set()
    assert cancelled.wait(PATIENCE)
    handles = [busy.submit(*plan[0])]
    assert handles[0].wait(PATIENCE) and handles[0].status().cached >= 384
    with held(busy):
        handles += [busy.submit(prompt, params) for prompt, params in plan[1:]]
    for handle, (prompt, params) in zip(handles, plan, strict=True):
        got = handle.result()
        want = alone.generate({"prompt_token_ids": prompt}, params)[0]
        assert [o.token_ids for o in got.outputs] == [o.token_ids for o in want.outputs]
    assert busy.stats().preemptions_total > 0


def test_sparse_work_is_counted(sparse: LLM) -> None:
    """A million tokens: less than dense; halves add up; the selection grows with the length."""
    engine = sparse.engine
    assert engine.sparse is not None
    cost = CostModel(engine.config, ExpectedKeys(engine.sparse.mean_columns))
    half, whole = 524_288, 1_048_576
    seconds = cost.prefill_seconds(0, whole, True)
    parts = cost.prefill_seconds(0, half, True), cost.prefill_seconds(half, whole, True)
    assert sum(parts) == pytest.approx(seconds, rel=1e-9) and parts[1] > parts[0]
    assert seconds < 0.1 * cost.prefill_seconds(0, whole)
    assert prefill_flops(engine.config, 0, whole) > 0


def test_scratch_is_what_is_said_and_is_counted(deep: Path) -> None:
    llm, dense = (load(deep, attention=name) for name in ("auto", "dense"))
    attention, engine = llm.engine.sparse, llm.engine
    assert attention is not None and dense.engine.sparse is None
    held = attention._vertical.nbytes + attention._slash.nbytes
    assert held == score_bytes(engine.config, engine.max_model_len)
    assert engine.plan.items["scratch"] - dense.engine.plan.items["scratch"] == held
    # and the rotary table has the rows of the selecting positions
    for one in (engine, dense.engine):
        assert one.plan.items["rotary table"] == one.rotary.table.nbytes
    assert engine.rotary.table.nbytes > dense.engine.rotary.table.nbytes


@pytest.mark.parametrize(
    ("options", "params", "error", "words"),
    [
        ({"attention": "fast"}, {}, ConfigError,
         "attention: expected auto, dense, sparse, got 'fast'"),
        ({"attention": "dense"}, {"attention": "sparse"}, RequestError,
         'attention: expected "dense", as the engine is, got "sparse"'),
        ({"attention": "sparse", "prefill_chunk_tokens": 100}, {}, RequestError,
         "prefill of 700 tokens needs prefill_chunk_tokens of at least 192, got 100"),
        ({}, {"attention": "fast"}, RequestError,
         "attention: expected auto, dense, sparse or None, got 'fast'"),
        ({"sparse_config": "/nowhere.json"}, {}, ConfigError, "/nowhere.json: file not found"),
    ],
)  # fmt: skip
def test_refusals(
    deep: Path, options: dict[str, Any], params: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(load(deep, **options), prompt_ids(PROMPT), **params)
