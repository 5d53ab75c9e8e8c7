"""The engine on a device with a queue: a recorded one on the CPU, with its rules checked.

The numbers are the CPU backend's, or those of the emulated kernels of a GPU; what is tested is the
way to them: copies, captured steps, tokens that stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.capture import mapped
from lib.checkpoints import model_config, write_checkpoint
from lib.emulator import emulated_ops, library_path
from lib.hold import PATIENCE, together
from lib.lazy_device import LazyDevice
from lib.recording_device import GARBAGE, RecordingDevice
from lib.same_output import Answer, compare
from qwen1m_ext import LLM, SamplingParams, assembly, choices, ops
from qwen1m_ext.choices import Wanted, choose_device
from qwen1m_ext.config import load_config
from qwen1m_ext.decode_step import GRAPH_BYTES, decode_sizes, decode_step_bytes
from qwen1m_ext.device import CPU, STAGES
from qwen1m_ext.errors import BackendError, MemoryBudgetError, WeightsError
from qwen1m_ext.events import Progress
from qwen1m_ext.kv_cache import pages_for
from qwen1m_ext.request import RequestOutput
from qwen1m_ext.sampler import Sampler

GREEDY = SamplingParams(temperature=0, max_tokens=20)
OPTIONS: dict[str, Any] = {"max_model_len": 1024, "prefill_chunk_tokens": 100, "max_num_seqs": 5}


def prompt(length: int, seed: int = 0) -> dict[str, list[int]]:
    return {"prompt_token_ids": [(7 * seed + i * i + 3 * i) % 250 for i in range(length)]}


PROMPTS = [prompt(30 + 40 * i, i) for i in range(7)]


def tokens(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def values(logprobs: Any) -> list[float]:
    return [one.logprob for row in logprobs or () for one in (row or {}).values()]


def queue_of(llm: LLM) -> RecordingDevice:
    assert isinstance(llm.engine.device, RecordingDevice)
    return llm.engine.device


@pytest.fixture(scope="module")
def cpu(checkpoint: Path) -> LLM:
    return LLM(checkpoint, **OPTIONS)


@pytest.fixture(scope="module")
def queued(checkpoint: Path) -> Iterator[LLM]:
    """The same model on a device with a queue."""
    llm = LLM(checkpoint, device=RecordingDevice(), **OPTIONS)
    yield llm
    assert queue_of(llm).spilled == 0, "the inputs of a step did not fit into what was planned"


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, n=2),
        SamplingParams(temperature=0, max_tokens=20, presence_penalty=0.8, frequency_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=12, logprobs=2),  # these come to the host
        SamplingParams(temperature=0, max_tokens=12, min_tokens=5, logit_bias={7: 2.0}),
        SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1),
    ],
    ids=["greedy", "repetition", "presence", "logprobs", "bias", "prompt_logprobs"],
)
def test_tokens_are_those_of_the_cpu(cpu: LLM, queued: LLM, params: SamplingParams) -> None:
    """Seven prompts for five places: chunks and decodes share steps, samples come and go."""
    want, got = (llm.generate(PROMPTS, params) for llm in (cpu, queued))
    assert tokens(got) == tokens(want)
    for a, b in zip(want, got, strict=True):
        if params.logprobs:
            assert values(b.outputs[0].logprobs) == pytest.approx(
                values(a.outputs[0].logprobs), abs=1e-4
            )
        if params.prompt_logprobs:
            assert values(b.prompt_logprobs) == pytest.approx(values(a.prompt_logprobs), abs=1e-4)


def test_steps_are_replayed(queued: LLM) -> None:
    """One sequence takes the graph of one row, five that of the largest."""
    sizes = decode_sizes(5)
    assert sizes == [1, 2, 4, 5]
    graphs = dict(zip(reversed(sizes), queue_of(queued).graphs, strict=True))
    before = {size: graph.replays for size, graph in graphs.items()}
    queued.generate(PROMPTS[0], GREEDY)
    assert graphs[1].replays >= before[1] + 18
    assert all(graphs[size].replays == before[size] for size in (2, 4, 5))
    with together(queued.engine, 5):
        queued.generate(PROMPTS[:5], GREEDY)
    assert graphs[5].replays > before[5]


def test_without_graphs(checkpoint: Path, cpu: LLM) -> None:
    """Three sequences in a step of four rows: what is padding writes nowhere."""
    llm = LLM(checkpoint, device=RecordingDevice(), cuda_graphs=False, **OPTIONS)
    assert queue_of(llm).graphs == []
    assert tokens(llm.generate(PROMPTS[:3], GREEDY)) == tokens(cpu.generate(PROMPTS[:3], GREEDY))


def test_a_seed_draws_the_same_whoever_else_runs(queued: LLM) -> None:
    params = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=5, max_tokens=16)
    alone = tokens([queued.generate(PROMPTS[2], params)[0]])[0]
    together = tokens(queued.generate(PROMPTS, params))[2]
    other = tokens(queued.generate(PROMPTS[2], SamplingParams(temperature=0.9, seed=6)))[0]
    assert alone == together
    assert other[0] != alone[0][:16]


def test_preempted_and_back(checkpoint: Path) -> None:
    """Too few pages for all: those that give way are computed again, penalties included."""
    options = OPTIONS | {"max_model_len": 384, "max_num_seqs": 4}
    params = SamplingParams(temperature=0, max_tokens=150, repetition_penalty=1.2, ignore_eos=True)
    prompts = [prompt(100, i) for i in range(4)]
    want = LLM(checkpoint, **options)
    got = LLM(checkpoint, device=RecordingDevice(), **options)
    with together(got.engine, len(prompts)):
        outputs = got.generate(prompts, params)
    assert tokens(outputs) == tokens(want.generate(prompts, params))
    assert got.engine.stats().preemptions_total > 0


def test_a_session_goes_on(cpu: LLM, queued: LLM) -> None:
    outputs = []
    for llm in (cpu, queued):
        session = llm.engine.open_session(freeze_temperature=True)
        ids = PROMPTS[1]["prompt_token_ids"]
        first = llm.engine.submit(ids, GREEDY, session=session).result()
        said = [*ids, *first.outputs[0].token_ids, 5, 6]
        second = llm.engine.submit(said, GREEDY, session=session).result()
        assert second.num_cached_tokens == len(ids) + len(first.outputs[0].token_ids) - 1
        outputs.append([first, second])
        session.close()
    assert tokens(outputs[0]) == tokens(outputs[1])


def test_masks_of_a_processor_and_free_samples_share_a_step(cpu: LLM, queued: LLM) -> None:
    """One sample's logits come to the host in every step, the other's never do."""

    def even(index: int) -> Any:
        def mask(output: list[int], logits: Tensor) -> Tensor:
            logits[1::2] = -torch.inf
            return logits

        return mask

    results = []
    for llm in (cpu, queued):
        ids = [p["prompt_token_ids"] for p in PROMPTS[:2]]
        masked = llm.engine.submit(ids[0], GREEDY, logits_processor=even)
        free = llm.engine.submit(ids[1], GREEDY)
        results.append(tokens([masked.result(), free.result()]))
    assert results[0] == results[1]
    assert all(token % 2 == 0 for token in results[1][0][0])


def test_sparse_prefill(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, gain=2.0)
    options = OPTIONS | {"attention": "sparse", "prefill_chunk_tokens": 1024}
    want, got = (
        LLM(directory, device=device, **options).generate(prompt(700), GREEDY)
        for device in (CPU, RecordingDevice())
    )
    assert tokens(got) == tokens(want)
    assert got[0].metrics.recall == pytest.approx(want[0].metrics.recall)


def test_the_next_step_does_not_wait_for_the_last(checkpoint: Path, cpu: LLM) -> None:
    """Three steps are queued before the host hears of the first one's token."""
    llm = LLM(checkpoint, device=RecordingDevice(), **OPTIONS)
    ids = PROMPTS[0]["prompt_token_ids"]
    core, request = llm.engine._core, llm.engine._intake.request(ids, GREEDY)
    sequence = request.samples[0]
    sequence.sampler = Sampler(GREEDY, ids)
    core.scheduler.add(request)
    results = []
    for _ in range(3):
        step = core.scheduler.plan()
        assert step is not None
        results.append(core.runner.run(step))
    assert sequence.tokens == ids and not any(result.sampled for result in results)
    for result in results:
        assert result.finish is not None
        result.finish()
    want = tokens(cpu.generate(PROMPTS[0], GREEDY))[0][0][:3]
    assert sequence.tokens == ids + want
    assert [result.sampled for result in results] == [[(sequence, t, None)] for t in want]


@pytest.mark.parametrize(
    ("architecture", "attention", "kv", "offload"),
    [
        ("emu_sm90", "dense", "auto", None),
        ("emu_sm80", "dense", "auto", None),
        ("emu_sm90", "sparse", "auto", None),
        ("emu_sm80", "sparse", "fp8", None),
        ("emu_sm90", "dense", "fp8", "host"),
    ],
)
def test_emulated_kernels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    attention: str,
    kv: str,
    offload: Any,
) -> None:
    """A whole model by the kernels of a GPU: weights to tokens, in bf16, captured and replayed.

    With layers in host memory: three through two slots, op by op.
    """
    if library_path() is None:
        pytest.skip("libqwen1m_emu_ops.so is not built (make test builds it)")
    config = model_config(
        hidden_size=128, intermediate_size=192, num_attention_heads=2, num_key_value_heads=1,
        torch_dtype="bfloat16", num_hidden_layers=3 if offload else 2,
    )  # fmt: skip
    directory = write_checkpoint(tmp_path, config, gain=2.0, seed=3, dtype=torch.bfloat16)
    options: dict[str, Any] = {
        "max_model_len": 512, "max_num_seqs": 2, "attention": attention, "kv_cache_dtype": kv,
        "prefill_chunk_tokens": 100 if attention == "dense" else 256,
    }  # fmt: skip
    prompts, params = [prompt(150, 1), prompt(190, 2)], SamplingParams(temperature=0, max_tokens=6)
    cpu = LLM(directory, device="cpu", **options)
    with together(cpu.engine, len(prompts)):
        want = cpu.generate(prompts, replace(params, logprobs=2))
    plain = assembly.load_weights  # what a GPU allocates is aligned, a mapped file is not
    monkeypatch.setattr(assembly, "load_weights", lambda *a: mapped(plain(*a), torch.clone))
    with emulated_ops(architecture) as called:
        device = LazyDevice("computation") if offload else RecordingDevice()
        llm = LLM(directory, device=device, kv_offload=offload, **options)
        with together(llm.engine, len(prompts)):
            got = llm.generate(prompts, params)
        llm.engine.shutdown()
    wanted = Wanted(SEVEN, torch.bfloat16, llm.engine.kv_dtype, sparse=attention == "sparse")
    assert set(called) == set(wanted.ops)
    assert offload or sum(graph.replays for graph in device.graphs) >= 5
    # logits of this model spread over 60, in steps of up to 0.25: rounding moves them by more
    report = compare([Answer.of(o) for o in got], [Answer.of(o) for o in want], near_tie=1.5)
    assert report.beyond == [] and report.steps >= 6, report


def test_a_prefill_that_nobody_wants_stops_between_layers(queued: LLM) -> None:
    """Progress is reported from the queue's end; raising there ends the request, not the engine."""
    seen: list[int] = []

    def stop(progress: Progress) -> None:
        seen.append(progress.done)
        raise KeyError("enough")

    ids = prompt(600)["prompt_token_ids"]
    with pytest.raises(KeyError, match="enough"):
        queued.engine.submit(ids, GREEDY, on_progress=stop).result()
    assert len(seen) == 1 and 0 < seen[0] < 100
    assert len(queued.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids) == 20


# --- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("forward", lambda plain: lambda *a, **k: plain(*a, **k).clone(), "clone allocates"),
        ("logits", lambda plain: lambda h, out: (plain(h, out), out.sum().item()), "on the host"),
    ],
)
def test_a_step_that_breaks_a_rule_is_not_captured(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, words: str
) -> None:
    """On purpose: memory taken within a capture, a number read by the host."""
    build = assembly.DecodeStep

    def build_broken(model: Any, *arguments: Any) -> Any:
        setattr(model, name, broken(getattr(model, name)))
        return build(model, *arguments)

    monkeypatch.setattr(assembly, "DecodeStep", build_broken)
    with pytest.raises(AssertionError, match=words):
        LLM(checkpoint, device=RecordingDevice(), **OPTIONS)


def test_captured_memory_must_not_move(checkpoint: Path) -> None:
    """On purpose: a workspace that grows after the capture."""
    llm = LLM(checkpoint, device=RecordingDevice(), **OPTIONS)
    storage = llm.engine.model.workspace.q.untyped_storage()
    storage.resize_(64 * storage.nbytes())
    with pytest.raises(AssertionError, match="captured memory has moved"):
        llm.generate(PROMPTS[0], GREEDY)


def test_what_crosses_is_not_overwritten_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    device = RecordingDevice()
    device.reserve(1024, results=4)

    def steps() -> None:
        with device.scope():
            for i in range(2 * STAGES):
                with device.step():
                    assert device.put(torch.tensor([i])).tolist() == [i]
            device.finish_copies(device._done + len(device._copies))

    steps()
    monkeypatch.setattr(device, "record", lambda: None)  # on purpose: nobody waits
    with pytest.raises(AssertionError, match="page-locked memory was changed"):
        steps()


def test_results_are_garbage_until_they_are_waited_for() -> None:
    device = RecordingDevice()
    device.reserve(64, results=2)
    with device.scope():
        fetched = device.fetch(torch.tensor([5, 6]))
        assert device._copies[-1].target.tolist() == [GARBAGE] * 2
        assert fetched() == [5, 6]


def test_work_belongs_into_the_scope() -> None:
    with pytest.raises(AssertionError, match="outside of the scope"):
        RecordingDevice().record()


def test_more_inputs_than_reserved_take_the_slow_way() -> None:
    device = RecordingDevice()
    device.reserve(64, results=1)
    with device.scope(), device.step():
        assert device.put(torch.arange(100)).tolist() == list(range(100))
    assert device.spilled == 1


def test_nan_logits_are_an_error(checkpoint: Path) -> None:
    llm = LLM(checkpoint, device=RecordingDevice(), **OPTIONS)
    llm.engine.model.weights.norm[:] = torch.nan
    with pytest.raises(WeightsError, match="got NaN"):
        llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["while it runs", "while it is queued"])
def test_a_failed_kernel_ends_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Nothing on that device can go on: who watches the engine starts another process."""
    llm = LLM(checkpoint, device=RecordingDevice(), **OPTIONS)
    plain = llm.engine.model.forward

    def forward(*arguments: Any) -> Tensor:
        queue_of(llm).broken = True
        if when == "while it is queued":
            raise RuntimeError("it told the next launch")
        return plain(*arguments)

    monkeypatch.setattr(llm.engine.model, "forward", forward)
    with pytest.raises((BackendError, RuntimeError)):
        llm.generate(PROMPTS[0], GREEDY)
    for thread in llm.engine._core._threads:
        thread.join(PATIENCE)
    assert isinstance(llm.engine.failure, BackendError)
    with pytest.raises(BackendError, match="illegal memory access"):
        llm.generate(PROMPTS[0], GREEDY)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", [None, "ngram"])
def test_a_decode_step_is_what_the_plan_says(checkpoint: Path, speculative: Any) -> None:
    llm = LLM(checkpoint, device=RecordingDevice(), speculative=speculative, **OPTIONS)
    e = llm.engine
    step = e._core.runner._decodes
    assert step is not None
    tensors = [step._hidden, e.cache.decode_scratch]
    for inputs in step._inputs:
        tensors += [inputs.numbers, inputs.factors, inputs.block_table]
        tensors += [inputs.before, inputs.weights]
    tensors += [value for value in vars(step.sampler).values() if isinstance(value, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    allowance = GRAPH_BYTES * len(step._inputs)
    assert e.plan.items["decode step"] == sum(storages.values()) + allowance
    assert e.plan.items["step inputs"] == len(queue_of(llm)._staged)


def test_a_context_that_does_not_fit_is_refused(checkpoint: Path) -> None:
    device = RecordingDevice()
    device.available_bytes = lambda: 64 << 20  # type: ignore[method-assign]
    with pytest.raises(MemoryBudgetError, match="4096 tokens need .* decode step"):
        LLM(checkpoint, device=device, max_model_len=4096)


def test_bytes_of_a_decode_step_of_7b() -> None:
    """A million tokens, one sequence: a block table of 8,192 pages, and little else."""
    config = load_config_of("qwen2.5-7b-instruct-1m")
    size = decode_step_bytes(
        config, torch.bfloat16, rows=1, table_rows=1, max_tokens=1_000_000, num_sms=132,
        graphs=False, speculative=False, chunk_tokens=32_768,
    )  # fmt: skip
    assert size > 4 * pages_for(1_000_000)
    assert size < 64 << 20


def load_config_of(name: str) -> Any:
    from qwen1m_ext.config import read_config

    return read_config(Path(__file__).parent.parent / "fixtures" / "configs" / f"{name}.json")


# --- which device ---------------------------------------------------------------------------------

SEVEN = load_config_of("qwen2.5-7b-instruct-1m")
ALL = dict.fromkeys(ops.OP_NAMES, ["sm_80"])


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(ops, "cuda_kernels", lambda: ALL)
    monkeypatch.setattr(choices, "CudaDevice", RecordingDevice)


def test_a_gpu_is_taken(h200: None) -> None:
    wanted = Wanted(SEVEN, torch.bfloat16, torch.bfloat16, sparse=True)
    for name in ("auto", "cuda"):
        assert isinstance(choose_device(name, wanted), RecordingDevice)
    assert choose_device("cpu", wanted) is CPU


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "bfloat16, not in float32"),
        ({"config": replace(SEVEN, head_dim=96)}, "head_dim of 64 or 128, not 96"),
    ],
)
def test_what_a_gpu_cannot_do_is_said(
    h200: None, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], words: str
) -> None:
    """Demanded: an error. By itself: the CPU, with a word about it."""
    base = {"config": SEVEN, "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
    wanted = Wanted(**(base | changes))
    with pytest.raises(BackendError, match=words):
        choose_device("cuda", wanted)
    assert choose_device("auto", wanted) is CPU
    assert words in caplog.text


def test_another_gpu_or_build(
    h200: None, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    wanted = Wanted(SEVEN, torch.bfloat16, torch.bfloat16)
    without_sparse = {name: archs for name, archs in ALL.items() if "sparse" not in name}
    monkeypatch.setattr(ops, "cuda_kernels", lambda: without_sparse)
    assert isinstance(choose_device("cuda", wanted), RecordingDevice)
    with pytest.raises(BackendError, match="no CUDA kernel for sparse_estimate, sparse_plan"):
        choose_device("cuda", Wanted(SEVEN, torch.bfloat16, torch.bfloat16, sparse=True))
    small = Wanted(load_config(checkpoint), torch.bfloat16, torch.bfloat16)
    with pytest.raises(BackendError, match="head_dim of 64 or 128, not 16"):
        choose_device("cuda", small)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(BackendError, match=r"capability 8\.0 or 9\.0, got 7\.5"):
        choose_device("cuda", wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="torch .* (sees no GPU|was built without CUDA)"):
        choose_device("cuda", wanted)
    monkeypatch.setattr(ops, "cuda_kernels", dict)
    with pytest.raises(BackendError, match="built without CUDA kernels"):
        choose_device("cuda", wanted)
    assert choose_device("auto", wanted) is CPU
