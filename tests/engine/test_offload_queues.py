"""The engine with an offloaded cache on a device with queues: to the bit what it is without.

The devices (`lib/lazy_device.py`) copy as late, or as early, as the events allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.hold import together
from lib.lazy_device import AHEAD, LazyDevice, host_reads_wait
from lib.offload_engine import (
    GREEDY,
    LAYER,
    LAYERS,
    TOKENS,
    answer,
    deep_model,
    load,
    prompt_ids,
)
from lib.recording_device import RecordingDevice
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.errors import MemoryBudgetError
from qwen1m_ext.kv_cache import pages_for
from qwen1m_ext.offload import OffloadedCache
from qwen1m_ext.offload_copies import QueueCopies
from qwen1m_ext.sampler import Sampler
from qwen1m_ext.session_files import load_session, save_session, session_path


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_model(tmp_path_factory.mktemp("deep"))


def load_on(device: Any, directory: Path, **options: Any) -> LLM:
    return load(directory, device=device, cuda_graphs=False, **options)


@pytest.fixture(scope="module")
def plain(deep: Path) -> LLM:
    """Without offload, one queue."""
    return load_on(RecordingDevice(), deep)


@pytest.fixture(scope="module", params=[(a, b) for a in AHEAD for b in (None, 3 * LAYER)])
def offloaded(deep: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Two slots only, or one layer that stays."""
    ahead, budget = request.param
    device = LazyDevice(ahead)
    with host_reads_wait(device):
        yield load_on(device, deep, kv_offload="host", device_kv_bytes=budget)
    assert device.spilled == 0
    assert (device.put_off > 0) == (ahead == "copies")


@pytest.fixture(params=AHEAD)
def queues(request: pytest.FixtureRequest) -> Iterator[LazyDevice]:
    device = LazyDevice(request.param)
    with host_reads_wait(device):
        yield device


def states(llm: LLM, tokens: list[int]) -> tuple[Any, list[Tensor]]:
    """An answer that stays on the device, and the hidden states behind each token."""
    model, seen = llm.engine.model, []
    logits = model.logits

    def noted(hidden: Tensor, *rest: Any) -> Tensor:
        seen.append(hidden.clone())
        return logits(hidden, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "logits", noted)
        return answer(llm, tokens, GREEDY), seen


def test_prefill_is_equal_to_the_bit(plain: LLM, offloaded: LLM) -> None:
    for length in (1, 128, 777):
        prompt = prompt_ids(length)
        assert torch.equal(offloaded.logits(prompt), plain.logits(prompt))


def test_decode_is_equal_to_the_bit(plain: LLM, offloaded: LLM) -> None:
    """Sampled on the device, one step queued behind the other; and by the host."""
    for length in (5, 120, 500):
        (want, a), (got, b) = (states(llm, prompt_ids(length)) for llm in (plain, offloaded))
        assert got == want and len(a) == len(b) >= 20
        device = offloaded.engine.device
        assert isinstance(device, LazyDevice)
        device.finish()
        assert all(torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))
    assert answer(offloaded, prompt_ids(120)) == answer(plain, prompt_ids(120))


def test_forks_and_a_reused_prefix(plain: LLM, offloaded: LLM) -> None:
    params = SamplingParams(n=3, seed=3, max_tokens=20, ignore_eos=True)
    for _ in range(2):
        got = answer(offloaded, prompt_ids(200, 4), params)
        assert got == answer(plain, prompt_ids(200, 4), params)


def test_many_requests_at_once_with_preemption(deep: Path, plain: LLM, queues: LazyDevice) -> None:
    offloaded = load_on(queues, deep, kv_offload="host", max_model_len=512)
    prompts: list[Any] = [
        {"prompt_token_ids": prompt_ids(length, length)} for length in (3, 130, 200, 100)
    ]
    params = replace(GREEDY, max_tokens=80)
    want = [plain.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    with together(offloaded.engine, len(prompts)):
        got = [output.outputs[0].token_ids for output in offloaded.generate(prompts, params)]
    assert got == want
    assert offloaded.engine.stats().preemptions_total > 0


def test_an_fp8_cache_and_sparse_prefill(deep: Path, queues: LazyDevice) -> None:
    options = {"kv_cache_dtype": "fp8", "attention": "sparse", "prefill_chunk_tokens": TOKENS}
    one = load_on(RecordingDevice(), deep, **options)
    other = load_on(queues, deep, kv_offload="host", **options)
    assert answer(other, prompt_ids(500)) == answer(one, prompt_ids(500))


def test_speculation(deep: Path, plain: LLM, queues: LazyDevice) -> None:
    """Prepared checks, with pages that a wrong guess has written."""
    prompt = {"prompt_token_ids": prompt_ids(20) * 10}
    guessing = load_on(queues, deep, kv_offload="host", speculative="ngram", max_num_seqs=2)
    guessed = accepted = 0
    drawn = replace(GREEDY, max_tokens=60, temperature=50.0, top_k=2, seed=1)
    for params in (replace(GREEDY, max_tokens=60), drawn):  # all guesses are right, or some
        want, got = (llm.generate(prompt, params)[0] for llm in (plain, guessing))
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
        guessed += got.metrics.draft_tokens
        accepted += got.metrics.accepted_tokens
    assert guessed > accepted > 0


def test_sessions_and_their_files(
    deep: Path, plain: LLM, queues: LazyDevice, tmp_path: Path
) -> None:
    """A file of an engine with offload serves one without, and the other way round."""
    prompt, more = prompt_ids(300, 9), prompt_ids(50, 10)
    tight = load_on(queues, deep, kv_offload="host")

    def turn(llm: LLM, session: Any, tokens: list[int]) -> list[int]:
        stream = llm.stream({"prompt_token_ids": tokens}, GREEDY, session=session)
        return list(stream)[-1].outputs[0].token_ids

    files, want = {}, []
    for name, llm in (("plain", plain), ("tight", tight)):
        with closing(llm.open_session(freeze_temperature=True)) as session:
            turn(llm, session, prompt)
            files[name] = session_path(tmp_path, name)
            save_session(llm.engine, session, tmp_path, name)
            continued = turn(llm, session, prompt + more)
        want = want or continued
        assert continued == want
    for name, llm in (("plain", tight), ("tight", plain)):
        with closing(load_session(llm.engine, files[name])) as session:
            assert turn(llm, session, prompt + more) == want


def test_a_cancelled_prefill_with_copies_under_way(
    deep: Path, plain: LLM, queues: LazyDevice
) -> None:
    def stop(progress: Any) -> None:
        if progress.done > 250:
            raise KeyboardInterrupt

    tight = load_on(queues, deep, kv_offload="host")
    with pytest.raises(KeyboardInterrupt):
        tight.generate({"prompt_token_ids": prompt_ids(600, 8)}, GREEDY, on_progress=stop)
    assert answer(tight, prompt_ids(600, 8)) == answer(plain, prompt_ids(600, 8))


def test_the_host_waits_for_no_copy_within_a_step(deep: Path) -> None:
    """Two decode steps are queued, and nothing of them has been done."""
    device = LazyDevice("copies")
    with host_reads_wait(device):
        llm = load_on(device, deep, kv_offload="host")
        core, request = llm.engine._core, llm.engine._intake.request(prompt_ids(90), GREEDY)
        request.samples[0].sampler = Sampler(GREEDY, prompt_ids(90))
        core.scheduler.add(request)
        results = []
        for i in range(3):
            step = core.scheduler.plan()
            assert step is not None
            if i == 1:
                done = device.computation.done
            results.append(core.runner.run(step))
        assert device.computation.done == done
        for result in results:
            assert result.finish is not None
            result.finish()
    assert len(request.samples[0].tokens) == 93


def test_a_budget_for_all_layers_leaves_the_graphs(deep: Path, plain: LLM) -> None:
    """Nothing is copied then: a device without queues for it will do."""
    options: Any = {"max_model_len": TOKENS, "kv_offload": "host", "device_kv_bytes": 5 * LAYER}
    device = RecordingDevice()
    llm = LLM(deep, device=device, prefill_chunk_tokens=100, max_num_seqs=2, **options)
    assert answer(llm, prompt_ids(200), GREEDY) == answer(plain, prompt_ids(200), GREEDY)
    assert len(device.graphs) == 2 and device.graphs[1].replays >= 18
    assert llm.engine.plan.host == {}


def test_a_host_with_too_little_memory_is_refused(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen1m_ext.engine.available_bytes", lambda: LAYERS * LAYER - 1)
    words = rf"1024 tokens need {LAYERS * LAYER} bytes of page-locked host memory"
    with pytest.raises(MemoryBudgetError, match=words):
        load_on(LazyDevice("computation"), deep, kv_offload="host")


def test_an_engine_allocates_its_plan(deep: Path) -> None:
    """To the byte: slots, the pages that cross, and the homes."""
    llm = load_on(LazyDevice("computation"), deep, kv_offload="host", device_kv_bytes=3 * LAYER)
    cache, plan = llm.engine.cache, llm.engine.plan
    assert isinstance(cache, OffloadedCache) and isinstance(cache._copies, QueueCopies)
    bounce = cache._copies._bounce
    held = sum(t.nbytes for t in (*cache.device_tensors(), bounce, cache.block_table))
    assert plan.items["kv cache"] + plan.items["kv slots"] == held
    homes = [t for i in cache.streamed for t in (cache.k[i], cache.v[i])]
    assert plan.host == {"kv cache": sum(t.nbytes for t in homes)}
    assert len({t.untyped_storage().data_ptr() for t in homes}) == 1
    assert pages_for(TOKENS) == cache.num_pages
