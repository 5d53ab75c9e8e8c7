"""Layers of the cache in host memory: the same bits, within the budget, copied ahead of time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.hold import PATIENCE, together
from lib.offload_engine import (
    GREEDY,
    LAYER,
    LAYERS,
    NOTED,
    PAGE,
    TOKENS,
    answer,
    deep_model,
    load,
    prompt_ids,
)
from qwen1m_ext import LLM, SamplingParams, offload_copies, ops
from qwen1m_ext.config import read_config
from qwen1m_ext.errors import BackendError, ConfigError
from qwen1m_ext.kv_cache import pages_for
from qwen1m_ext.offload import OffloadedCache, layer_bytes, streamed_layers
from qwen1m_ext.offload_copies import ThreadCopies, Transfer
from qwen1m_ext.session_files import load_session, save_session, session_path

CONFIG = Path(__file__).parent.parent / "fixtures" / "configs" / "qwen2.5-7b-instruct-1m.json"
BUDGETS = {"two slots": None, "one stays": 3 * LAYER + 7, "two stay": 4 * LAYER, "all": 5 * LAYER}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_model(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def plain(deep: Path) -> LLM:
    """Without offload."""
    return load(deep)


@pytest.fixture(scope="module", params=BUDGETS.values(), ids=BUDGETS)
def budget(request: pytest.FixtureRequest) -> int | None:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def offloaded(deep: Path, budget: int | None) -> LLM:
    return load(deep, kv_offload="host", device_kv_bytes=budget)


@pytest.fixture
def tight(deep: Path) -> LLM:
    """Two slots only, nothing cached."""
    return load(deep, kv_offload="host")


def cache_of(llm: LLM) -> OffloadedCache:
    cache = llm.engine.cache
    assert isinstance(cache, OffloadedCache)
    return cache


# --- the same bits --------------------------------------------------------------------------------


def test_prefill_is_equal_to_the_bit(plain: LLM, offloaded: LLM) -> None:
    """In chunks of 100 tokens: pages are read half full, and filled."""
    for length in (1, 128, 300, 777):
        prompt = prompt_ids(length)
        assert torch.equal(offloaded.logits(prompt), plain.logits(prompt))


def test_decode_is_equal_to_the_bit(plain: LLM, offloaded: LLM) -> None:
    """Across the end of a page."""
    for length in (5, 120, 500):
        assert answer(offloaded, prompt_ids(length)) == answer(plain, prompt_ids(length))


def test_a_reused_prefix_is_equal_to_the_bit(plain: LLM, offloaded: LLM) -> None:
    """The second request reads pages of the first."""
    first, second = (
        [answer(llm, prompt_ids(400, 3)) for _ in range(2)] for llm in (plain, offloaded)
    )
    assert first == second
    cached = offloaded.generate({"prompt_token_ids": prompt_ids(400, 3)}, NOTED)[0]
    assert cached.metrics.cached_tokens == 384


def test_samples_share_a_prompt(plain: LLM, offloaded: LLM) -> None:
    """Which of them share a step depends on the moment: same tokens, perhaps other last bits."""
    params = SamplingParams(n=3, seed=3, max_tokens=20, ignore_eos=True)
    assert answer(offloaded, prompt_ids(200, 4), params) == answer(
        plain, prompt_ids(200, 4), params
    )


def test_many_requests_at_once_with_preemption(plain: LLM, offloaded: LLM) -> None:
    prompts: list[Any] = [
        {"prompt_token_ids": prompt_ids(length, length)} for length in (3, 400, 130, 300, 64, 500)
    ]
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    want = [plain.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    with together(offloaded.engine, len(prompts)):
        got = [output.outputs[0].token_ids for output in offloaded.generate(prompts, params)]
    assert got == want
    assert offloaded.engine.stats().preemptions_total > 0


def test_speculation(deep: Path, plain: LLM) -> None:
    prompt = prompt_ids(20) * 10
    params = replace(GREEDY, max_tokens=60)
    guessing = load(deep, kv_offload="host", speculative="ngram")
    assert [t for t, _ in answer(guessing, prompt, params)] == [
        t for t, _ in answer(plain, prompt, params)
    ]


def test_an_fp8_cache_is_equal_to_the_bit(deep: Path) -> None:
    """Codes travel; scales stay, and so do the pages that a layer is widened into."""
    one = load(deep, kv_cache_dtype="fp8")
    other = load(deep, kv_cache_dtype="fp8", kv_offload="host", device_kv_bytes=3 * LAYER // 4)
    assert len(cache_of(other).streamed) == LAYERS - 1
    assert torch.equal(other.logits(prompt_ids(300)), one.logits(prompt_ids(300)))
    assert answer(other, prompt_ids(500)) == answer(one, prompt_ids(500))


def test_sparse_prefill_is_equal_to_the_bit(deep: Path) -> None:
    options = {"attention": "sparse", "prefill_chunk_tokens": TOKENS}
    one, other = load(deep, **options), load(deep, kv_offload="host", **options)
    assert answer(other, prompt_ids(900)) == answer(one, prompt_ids(900))


def test_sessions_and_their_files(deep: Path, plain: LLM, tight: LLM, tmp_path: Path) -> None:
    """A file of an engine with offload serves one without, and the other way round."""
    prompt, more = prompt_ids(300, 9), prompt_ids(50, 10)

    def turn(llm: LLM, session: Any, tokens: list[int]) -> list[int]:
        stream = llm.stream({"prompt_token_ids": tokens}, NOTED, session=session)
        return list(stream)[-1].outputs[0].token_ids

    files = {}
    for name, llm in (("plain", plain), ("tight", tight)):
        with closing(llm.open_session(freeze_temperature=True)) as session:
            turn(llm, session, prompt)
            files[name] = session_path(tmp_path, name)
            save_session(llm.engine, session, tmp_path, name)
            continued = turn(llm, session, prompt + more)
        if name == "plain":
            want = continued
        assert continued == want
    for name, llm in (("plain", tight), ("tight", plain)):
        with closing(load_session(llm.engine, files[name])) as session:
            assert turn(llm, session, prompt + more) == want


# --- within the budget ----------------------------------------------------------------------------


@contextmanager
def watched(seen: Callable[[str, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Every op that takes keys and values says which."""

    def watch(name: str, first: int, op: Callable[..., None], *args: Any) -> None:
        seen(name, args[first], args[first + 1])
        op(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("qkv_rope_append", "decode_attention", "prefill_attention"):
            first = 1 if name == "qkv_rope_append" else 3

            patch.setattr(ops, name, partial(watch, name, first, getattr(ops, name)))
        yield


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Address and bytes of what is really allocated."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_what_is_computed_on_stays_within_the_budget(offloaded: LLM, budget: int | None) -> None:
    used: list[torch.Tensor] = []
    with watched(lambda _, k, v: used.extend((k, v))):
        answer(offloaded, prompt_ids(333, 21))
    device = storages(cache_of(offloaded).device_tensors())
    assert storages(used) == device  # all of it is needed, and nothing else is touched
    assert sum(device.values()) <= (budget or 2 * LAYER)
    assert len(device) == 2 * (2 if budget is None else budget // LAYER)


def test_the_budget_is_spent_on_layers_that_stay() -> None:
    config = replace(read_config(CONFIG), num_layers=28)
    size = layer_bytes(config, torch.bfloat16, 1000)
    for held, away in ((0, 28), (2, 28), (3, 27), (4, 26), (27, 3), (28, 0), (40, 0)):
        layers = streamed_layers(config, torch.bfloat16, 1000, held * size)
        assert len(layers) == away and layers == sorted(set(layers))
        assert (0 in layers) == (away == 28)
    assert streamed_layers(config, torch.bfloat16, 1000, 16 * size) == list(range(1, 28, 2))


def test_pages_in_use_are_copied_and_no_others(tight: LLM) -> None:
    """A prompt of 300 tokens in one chunk of 300, then single tokens: 0, then 3 pages come in."""
    llm, cache = tight, cache_of(tight)
    answer(llm, prompt_ids(130, 5))  # lies beside it in the cache, but not in use
    cache.trace = []
    prompt = prompt_ids(300, 6)
    answer(llm, prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    steps = [(0, 100), (100, 200), (200, 300), (300, 301), (301, 302)]
    moved = [(t.kind, t.layer, t.num_bytes) for t in cache.trace if t.kind != "wait"]
    assert len(moved) == 2 * LAYERS * len(steps)
    for (begin, end), i in zip(steps, range(0, len(moved), 2 * LAYERS), strict=True):
        load, store = pages_for(begin) * PAGE, (pages_for(end) - begin // 128) * PAGE
        want = [(kind, n, load if kind == "load" else store)
                for kind in ("load", "store") for n in range(LAYERS)]  # fmt: skip
        assert sorted(moved[i : i + 2 * LAYERS]) == want


# --- ahead of their turn --------------------------------------------------------------------------


def test_the_next_layer_comes_while_this_one_computes(tight: LLM) -> None:
    """Attention of a layer waits for the copies asked for so far: the next layer is among them."""
    cache = cache_of(tight)
    trace: list[Transfer] = []
    cache.trace = trace
    assert isinstance(cache._copies, ThreadCopies)
    worker = cache._copies._worker
    late: list[int] = []
    calls = 0

    def wait_for_next(name: str, *_: torch.Tensor) -> None:
        nonlocal calls
        if name == "qkv_rope_append" or late:
            return
        layer = calls % LAYERS
        calls += 1
        needed = LAYERS * (calls // LAYERS) + min(LAYERS, layer + 2) if layer + 1 < LAYERS else 0
        worker.submit(lambda: None).result(PATIENCE)  # behind all copies asked for so far
        if sum(t.kind == "load" for t in list(trace)) < needed:
            late.append(layer)

    with watched(wait_for_next):
        answer(tight, prompt_ids(50), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert calls == 4 * LAYERS and late == []


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 9, 10, 31])
def test_a_failed_copy_is_an_error_of_its_requests(
    tight: LLM, plain: LLM, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of no others: the same prompt is answered afterwards, from what was complete."""
    calls = 0

    def copyto(target: Any, source: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError("the link is down")
        np_copyto(target, source)

    np_copyto = np.copyto
    monkeypatch.setattr(offload_copies.np, "copyto", copyto)
    with pytest.raises(BackendError, match=r"kv offload: the (load|store) of layer \d failed: the"):
        answer(tight, prompt_ids(350, 7))
    assert answer(tight, prompt_ids(350, 7))[0][0] == answer(plain, prompt_ids(350, 7))[0][0]


def test_a_cancelled_prefill_leaves_no_copy_behind(tight: LLM, plain: LLM) -> None:
    def stop(progress: Any) -> None:
        if progress.done > 250:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tight.generate({"prompt_token_ids": prompt_ids(600, 8)}, NOTED, on_progress=stop)
    assert answer(tight, prompt_ids(600, 8))[0][0] == answer(plain, prompt_ids(600, 8))[0][0]


def test_a_step_that_is_given_up_waits_for_its_copies(
    tight: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None goes on behind it: the next step would compute in a slot that is being written."""
    cache = cache_of(tight)
    begun, ended = threading.Event(), []
    np_copyto = np.copyto

    def slow_copyto(target: Any, source: Any) -> None:
        begun.set()
        time.sleep(0.2)
        np_copyto(target, source)
        ended.append(target)

    monkeypatch.setattr(offload_copies.np, "copyto", slow_copyto)
    with closing_sequence(cache) as sequence:
        sequence.append(300)
        with pytest.raises(KeyboardInterrupt), cache.step([(sequence, 200, 300)]):
            assert begun.wait(PATIENCE)
            raise KeyboardInterrupt
        count = len(ended)
        assert count in (2, 4), "keys and values of one layer, or of both that were coming"
        time.sleep(0.5)
        assert len(ended) == count


@contextmanager
def closing_sequence(cache: OffloadedCache) -> Iterator[Any]:
    sequence = cache.open()
    try:
        yield sequence
    finally:
        cache.close(sequence)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kv_offload": "disk"}, "kv_offload: expected host or None, got 'disk'"),
        ({"device_kv_bytes": 1 << 30}, "device_kv_bytes: expected kv_offload beside it"),
        (
            {"kv_offload": "host", "device_kv_bytes": 2 * LAYER - 1},
            rf"device_kv_bytes: expected at least {2 * LAYER} \(two layers of 1024 tokens\), "
            rf"got {2 * LAYER - 1}",
        ),
    ],
)
def test_refusals(deep: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load(deep, **options)
