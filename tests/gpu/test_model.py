"""Whole models on a GPU against the CPU backend. `pytest --device=cuda tests/gpu`.

bf16 products are summed in another order there, so tokens may part where the two likeliest are
closer than rounding: that far they have to be the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.checkpoints import model_config, write_checkpoint
from lib.same_output import NEAR_TIE, WAYS, Case, Setup, alone, compare, make_cases
from qwen1m_ext import LLM, SamplingParams, demo_model_path
from qwen1m_ext.device import CudaDevice
from qwen1m_ext.engine import Engine
from qwen1m_ext.haystack import make_sample
from qwen1m_ext.sampler import Sampler
from qwen1m_ext.sparse_config import SparseSettings
from qwen1m_ext.speculative import NgramSpeculator


@pytest.fixture(scope="module")
def demo() -> dict[str, LLM]:
    """The demo model, by device."""
    options: dict[str, Any] = {"max_model_len": 9000, "max_num_seqs": 6, "attention": "sparse"}
    return {"cpu": LLM(demo_model_path(), device="cpu", **options)}


def on_gpu(demo: dict[str, LLM], **options: Any) -> LLM:
    name = repr(options)
    if name not in demo:
        base: dict[str, Any] = {"max_model_len": 9000, "max_num_seqs": 6, "attention": "sparse"}
        demo[name] = LLM(demo_model_path(), device="cuda", **base, **options)
    return demo[name]


def prompts(llm: LLM) -> list[dict[str, list[int]]]:
    """Within one Dual Chunk, across one border, across many."""
    encode = llm.get_tokenizer().encode
    return [
        {"prompt_token_ids": encode(make_sample(length, seed=seed).prompt)}
        for seed, length in ((1, 1000), (2, 1500), (3, 8000))
    ]


def assert_same_tokens(want: Any, got: list[int]) -> None:
    """Up to the first near tie, by the log probabilities of `want`."""
    for i, (a, b) in enumerate(zip(want.token_ids, got, strict=False)):
        if a == b:
            continue
        best = sorted((one.logprob for one in want.logprobs[i].values()), reverse=True)
        assert best[0] - best[1] < NEAR_TIE, f"token {i}: expected {a}, got {b}"
        return
    assert len(got) == len(want.token_ids)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_the_demo_model(gpu: str, demo: dict[str, LLM], cuda_graphs: bool, attention: Any) -> None:
    cpu, cuda = demo["cpu"], on_gpu(demo, cuda_graphs=cuda_graphs)
    params = SamplingParams(temperature=0, max_tokens=24, attention=attention)
    noted = SamplingParams(temperature=0, max_tokens=24, attention=attention, logprobs=2)
    asked = prompts(cpu)
    outputs = cpu.generate(asked, noted), cuda.generate(asked, params)
    for want, got in zip(*outputs, strict=True):
        assert_same_tokens(want.outputs[0], list(got.outputs[0].token_ids))


def test_shapes_of_7b(gpu: str, tmp_path: Path) -> None:
    """Two layers with 28/4 heads of 128: logits of every position of a prompt over two borders."""
    config = model_config(
        hidden_size=1792, head_dim=128, intermediate_size=2048, num_attention_heads=28,
        num_key_value_heads=4, torch_dtype="bfloat16",
        dual_chunk_attention_config={
            "chunk_size": 256, "local_size": 64, "original_max_position_embeddings": 256,
        },
    )  # fmt: skip
    directory = write_checkpoint(tmp_path, config, dtype=torch.bfloat16)
    ids = [(i * i + 3 * i) % 250 for i in range(600)]
    want, got = (LLM(directory, device=d, max_model_len=700).logits(ids) for d in ("cpu", "cuda"))
    a, b = want.log_softmax(-1), got.log_softmax(-1)
    divergence = (a.exp() * (a - b)).sum(-1)
    assert float(divergence.mean()) < 1e-3
    assert float(divergence.max()) < 5e-2


def test_many_at_once_and_with_penalties(gpu: str, demo: dict[str, LLM]) -> None:
    """Nine prompts for six places; sampled ones repeat with their seed."""
    cuda = on_gpu(demo, cuda_graphs=True)
    asked = [{"prompt_token_ids": list(range(20 + i, 220))} for i in range(9)]
    params = SamplingParams(
        temperature=0.8, top_p=0.9, top_k=30, repetition_penalty=1.1, seed=3, max_tokens=40,
        ignore_eos=True,
    )  # fmt: skip
    first, again = (cuda.generate(asked, params) for _ in range(2))
    assert [r.outputs[0].token_ids for r in first] == [r.outputs[0].token_ids for r in again]


class OnGpu(Setup):
    """Engines of a setup, on the GPU."""

    def engine(self, cases: list[Case], **more: Any) -> Engine:
        return super().engine(cases, device="cuda", **more)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_same_output_in_every_way(gpu: str, attention: str) -> None:
    """Batching, preemption, reuse, resuming, guessing: tokens part at near ties only."""
    settings = SparseSettings(positions="real", window_tokens=1024)
    options = {"attention": attention, "sparse_settings": settings}
    setup = OnGpu(Path(demo_model_path()), options, small_chunk=1024)
    cases = make_cases([1400, 5000], max_tokens=32)
    want = alone(setup, cases)
    unseen = [replace(case, noted=False) for case in cases]  # tokens that need not leave the GPU
    for way in ("batching", "preemption", "prefix reuse", "resume after cancel", "speculation"):
        report = compare(*WAYS[way](setup, unseen, want))
        assert not report.beyond, (way, report.beyond)
    report = compare(*WAYS["session reload by another engine"](setup, cases, want))
    assert not report.beyond, report.beyond


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_layers_in_host_memory(gpu: str, demo: dict[str, LLM], attention: Any) -> None:
    """The same kernels on the same bytes: every token is the same, and so are their logits."""
    cuda, offloaded = (on_gpu(demo, cuda_graphs=False, kv_offload=o) for o in (None, "host"))
    params = SamplingParams(temperature=0, max_tokens=24, attention=attention)
    noted = replace(params, logprobs=2)
    for one in prompts(cuda):
        for chosen in (params, noted):
            want, got = (llm.generate(one, chosen)[0].outputs[0] for llm in (cuda, offloaded))
            assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)


@pytest.mark.parametrize("more", [{}, {"kv_offload": "host"}, {"speculative": "ngram"}], ids=str)
def test_a_decode_step_waits_for_nothing(gpu: str, more: dict[str, Any]) -> None:
    """Torch raises at every hidden synchronisation while steps are queued, checks among them."""
    options: dict[str, Any] = {"max_model_len": 600, "attention": "dense", **more}
    engine = LLM(demo_model_path(), device="cuda", **options).engine
    ids, params = (
        10 * [*range(30, 40)],
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    )
    core, request = engine._core, engine._intake.request(ids, params)
    request.samples[0].sampler = Sampler(params, ids)
    if more.get("speculative"):
        request.samples[0].speculator = NgramSpeculator()
    core.scheduler.add(request)
    results = []
    for i in range(3):
        step = core.scheduler.plan()
        assert step is not None
        torch.cuda.set_sync_debug_mode("error" if i else "default")
        try:
            results.append(core.runner.run(step))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert request.error is None, repr(request.error)
    for result in results:
        assert result.finish is not None
        result.finish()
    assert len(request.samples[0].tokens) == len(ids) + 3


@pytest.mark.parametrize("kv_offload", [None, "host"])
def test_memory_stays_within_the_plan(gpu: str, kv_offload: Any) -> None:
    """What torch has taken at most, against what the plan has reserved."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    llm = LLM(
        demo_model_path(), device="cuda", max_model_len=20_000, attention="sparse",
        kv_offload=kv_offload,
    )  # fmt: skip
    assert isinstance(llm.engine.device, CudaDevice)
    prompt = {"prompt_token_ids": [(i * i) % 250 for i in range(19_000)]}
    for attention in ("sparse", "dense"):
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8, attention=attention))  # type: ignore[arg-type]
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= llm.engine.plan.total, llm.engine.plan.items
