"""An offloaded cache on a device with queues: whatever the order allows, the bytes are the same.

Copies run on queues of their own, and on these devices (`lib/lazy_device.py`) as late, or as early,
as the events allow. Programs of steps, forks and host accesses are run beside a plain cache;
without any one of the waits in `QueueCopies` one of them gives something else.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lib.checkpoints import model_config, write_checkpoint
from lib.hold import together
from lib.lazy_device import LazyDevice, host_reads_wait
from lib.recording_device import RecordingDevice
from qwen1m_ext import LLM, SamplingParams, offload, offload_copies
from qwen1m_ext.config import read_config
from qwen1m_ext.errors import MemoryBudgetError
from qwen1m_ext.kv_cache import KVCache, SequenceCache, pages_for
from qwen1m_ext.offload import OffloadedCache, layer_bytes
from qwen1m_ext.offload_copies import QueueCopies, Transfer
from qwen1m_ext.ops import PAGE_SIZE
from qwen1m_ext.sampler import Sampler
from qwen1m_ext.session_files import load_session, save_session, session_path

CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"
SMALL = replace(
    read_config(CONFIGS / "qwen2.5-7b-instruct-1m.json"), num_layers=5, num_kv_heads=1, head_dim=8
)
AHEAD: tuple[Literal["computation", "copies"], ...] = ("computation", "copies")
LAYERS, TOKENS = 5, 1024
LAYER = TOKENS * 2 * 2 * 16 * 4  # bytes: K and V, 2 heads x 16 float32
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
NOTED = replace(GREEDY, logprobs=3)


# --- programs -------------------------------------------------------------------------------------


class Left(Exception):
    """Of a step, in the middle."""


class Program:
    """Random steps on a cache, from a seed; `seen` is all that was read of keys and values."""

    def __init__(self, cache: KVCache, seed: int) -> None:
        self.cache, self.random = cache, random.Random(seed)
        self.open: list[SequenceCache] = []
        self.seen: list[Tensor] = []
        self.written = 0

    def run(self, moves: int) -> list[Tensor]:
        for _ in range(moves):
            kinds = [self.step, self.step, self.leave_step, self.fork, self.read, self.write]
            self.random.choice(kinds)()
            while self.cache.allocator.num_free < 8 and self.open:
                self.cache.close(self.open.pop(self.random.randrange(len(self.open))))
        return self.seen

    def step(self, left_in: int | None = None) -> None:
        """Some sequences grow; then every layer is written and read."""
        while len(self.open) < 2:
            self.open.append(self.cache.open())
        spans = []
        newest = self.open[-1]
        for sequence in (self.random.choice(self.open[:-1]), newest):
            begin = sequence.length
            sequence.append(self.random.choice((1, 5, 130)))
            spans.append((sequence, begin, sequence.length))
        try:
            with self.cache.device.scope(), self.cache.step(spans):
                for layer in range(len(self.cache.k)):
                    pools = self.cache.layer(layer)
                    for sequence, begin, end in spans:
                        self._write(pools, sequence, begin, end)
                        if layer == left_in:
                            raise Left
                        self.seen += [self._rows(pool, sequence) for pool in pools]
                    self.cache.release(layer)
        except Left:
            for sequence, begin, _ in spans:
                sequence.truncate(begin)

    def leave_step(self) -> None:
        """As a cancelled request does. Often its pages are somebody else's at once."""
        self.step(left_in=self.random.randrange(len(self.cache.k)))
        self.random.choice((self.fork, self.write, lambda: None))()
        self.step()

    def fork(self) -> None:
        if self.open:
            source, forked = self.random.choice(self.open), self.cache.open()
            forked.fork(source, self.random.randint(0, source.length))
            self.open.append(forked)

    def read(self) -> None:
        """By the host, as a session is saved."""
        for sequence in self.open:
            self.cache.settle()
            with self.cache.device.scope():
                for pool in (*self.cache.k, *self.cache.v):
                    self.seen.append(self._rows(pool, sequence))

    def write(self) -> None:
        """By the host, as a session is loaded."""
        sequence = self.cache.open()
        sequence.append(200)
        self.cache.settle()
        with self.cache.device.scope():
            for pools in zip(self.cache.k, self.cache.v, strict=True):
                self._write(pools, sequence, 0, 200)
        self.open.append(sequence)

    def _write(self, pools: Any, sequence: SequenceCache, begin: int, end: int) -> None:
        slots = sequence.slots(begin, end)
        for pool in pools:
            self.written += 1
            values = torch.arange(end - begin, dtype=pool.dtype) + 1000 * self.written
            rows = values[:, None, None].expand(-1, *pool.shape[1::2])
            pool[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = rows

    def _rows(self, pool: Tensor, sequence: SequenceCache) -> Tensor:
        """[length, kv_heads, head_dim]."""
        pages = torch.tensor(sequence.pages, dtype=torch.int64)
        return pool[pages].transpose(1, 2).flatten(0, 1)[: sequence.length]


MOVES, SEEDS = 12, range(6)


def reads_what_a_plain_cache_has(ahead: Any, seed: int, copies: Any = QueueCopies) -> bool:
    tokens, seqs = 24 * PAGE_SIZE, 24
    want = Program(KVCache(SMALL, torch.float32, tokens, seqs), seed).run(MOVES)
    device = LazyDevice(ahead)
    with host_reads_wait(device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "QueueCopies", copies)
        budget = 3 * layer_bytes(SMALL, torch.float32, tokens)
        cache = OffloadedCache(
            SMALL, torch.float32, tokens, seqs, device=device, device_bytes=budget
        )
        assert cache.streamed == [1, 2, 3, 4]
        got = Program(cache, seed).run(MOVES)
        device.finish()
    assert len(want) == len(got) > 0
    return all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_bytes_are_those_of_a_plain_cache(ahead: Any, seed: int) -> None:
    assert reads_what_a_plain_cache_has(ahead, seed)


SOURCE = inspect.getsource(QueueCopies).splitlines()
WAITS = [
    i for i, line in enumerate(SOURCE)
    if re.search(r"\.wait\(|self\.finish\(\)|fromkeys|_device\.record\(\)\.synchronize", line)
]  # fmt: skip


def without(line: int) -> Any:
    """`QueueCopies` that lacks a line."""
    indent = SOURCE[line][: -len(SOURCE[line].lstrip())]
    lines = [*SOURCE[:line], indent + "pass", *SOURCE[line + 1 :]]
    names = dict(vars(offload_copies))
    exec("\n".join(lines), names)
    return names["QueueCopies"]


@pytest.mark.parametrize("line", WAITS, ids=[SOURCE[i].strip() for i in WAITS])
def test_every_wait_is_needed(line: int) -> None:
    """Planted errors: each wait left out, in turn."""
    broken = without(line)
    assert not all(
        reads_what_a_plain_cache_has(ahead, seed, broken) for ahead in AHEAD for seed in SEEDS
    )


# --- ahead of their turn --------------------------------------------------------------------------


def test_the_first_layer_comes_while_the_last_one_computes() -> None:
    """Across steps: once the second last layer is home, its slot is filled for the next step."""
    device = LazyDevice("copies")
    with host_reads_wait(device), device.scope():
        cache = OffloadedCache(SMALL, torch.float32, TOKENS, 2, device=device)
        sequence = cache.open()
        sequence.append(10)
        with cache.step([(sequence, 0, 10)]):
            for layer in range(LAYERS):
                cache.layer(layer)[0][sequence.pages[0], :, :10] = layer + 1
                cache.release(layer)
                if layer == LAYERS - 2:
                    second_last = device.record()
        sequence.append(1)
        with cache.step([(sequence, 10, 11)]):
            slot = cache._here[0][0]
            assert cache.k[0][sequence.pages[0], 0, 0].tolist() == [0.0] * 8  # not even written
            second_last.synchronize()
            assert device.computation.done == 2 * (LAYERS - 1)  # a wait and a write for each
            with device._executing():
                assert (slot[sequence.pages[0], :, :10] == 1).all()


def test_a_trace_of_copies() -> None:
    """What came in, what went out, and what the computation waited for, on one clock."""
    device = LazyDevice("computation")
    cache = OffloadedCache(SMALL, torch.float32, TOKENS, 2, device=device)
    sequence = cache.open()
    trace: list[Transfer] = []
    cache.trace = trace
    with device.scope():
        for begin, end in ((0, 300), (300, 301)):
            sequence.append(end - begin)
            with cache.step([(sequence, begin, end)]):
                for layer in range(LAYERS):
                    cache.layer(layer)
                    cache.release(layer)
    assert trace == []
    cache.settle()
    page = layer_bytes(SMALL, torch.float32, PAGE_SIZE)
    for kind, sizes in (("load", (0, 3)), ("store", (3, 1)), ("wait", (0, 0))):
        moved = [(t.layer, t.num_bytes) for t in trace if t.kind == kind]
        assert sorted(moved) == sorted((n, pages * page) for n in range(LAYERS) for pages in sizes)
    assert all(t.begin <= t.end for t in trace)
    ends = {(t.kind, t.layer): t for t in trace}  # of the second step
    for layer in range(LAYERS):
        assert ends["load", layer].end <= ends["wait", layer].end <= ends["store", layer].begin


# --- the engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of five layers."""
    config = model_config(num_hidden_layers=LAYERS)
    return write_checkpoint(tmp_path_factory.mktemp("deep"), config, gain=1.5)


def load(directory: Path, device: Any, **options: Any) -> LLM:
    options = {"max_model_len": TOKENS, "prefill_chunk_tokens": 100, **options}
    return LLM(directory, device=device, cuda_graphs=False, **options)


@pytest.fixture(scope="module")
def plain(deep: Path) -> LLM:
    """Without offload, one queue."""
    return load(deep, RecordingDevice())


@pytest.fixture(scope="module", params=[(a, b) for a in AHEAD for b in (None, 3 * LAYER)])
def offloaded(deep: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Two slots only, or one layer that stays."""
    ahead, budget = request.param
    device = LazyDevice(ahead)
    with host_reads_wait(device):
        yield load(deep, device, kv_offload="host", device_kv_bytes=budget)
    assert device.spilled == 0
    assert (device.put_off > 0) == (ahead == "copies")


@pytest.fixture(params=AHEAD)
def queues(request: pytest.FixtureRequest) -> Iterator[LazyDevice]:
    device = LazyDevice(request.param)
    with host_reads_wait(device):
        yield device


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def answer(llm: LLM, tokens: list[int], params: SamplingParams = NOTED) -> list[Any]:
    """Tokens and log probabilities of all samples: equal only if logits are, bit by bit."""
    output = llm.generate({"prompt_token_ids": tokens}, params)[0]
    return [(sample.token_ids, sample.logprobs) for sample in output.outputs]


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
    offloaded = load(deep, queues, kv_offload="host", max_model_len=512)
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
    one = load(deep, RecordingDevice(), **options)
    other = load(deep, queues, kv_offload="host", **options)
    assert answer(other, prompt_ids(500)) == answer(one, prompt_ids(500))


def test_sessions_and_their_files(
    deep: Path, plain: LLM, queues: LazyDevice, tmp_path: Path
) -> None:
    """A file of an engine with offload serves one without, and the other way round."""
    prompt, more = prompt_ids(300, 9), prompt_ids(50, 10)
    tight = load(deep, queues, kv_offload="host")

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

    tight = load(deep, queues, kv_offload="host")
    with pytest.raises(KeyboardInterrupt):
        tight.generate({"prompt_token_ids": prompt_ids(600, 8)}, GREEDY, on_progress=stop)
    assert answer(tight, prompt_ids(600, 8)) == answer(plain, prompt_ids(600, 8))


def test_the_host_waits_for_no_copy_within_a_step(deep: Path) -> None:
    """Two decode steps are queued, and nothing of them has been done."""
    device = LazyDevice("copies")
    with host_reads_wait(device):
        llm = load(deep, device, kv_offload="host")
        core, request = llm.engine._core, llm.engine._request(prompt_ids(90), GREEDY)
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


def test_a_host_with_too_little_memory_is_refused(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen1m_ext.engine.available_bytes", lambda: LAYERS * LAYER - 1)
    words = rf"1024 tokens need {LAYERS * LAYER} bytes of page-locked host memory"
    with pytest.raises(MemoryBudgetError, match=words):
        load(deep, LazyDevice("computation"), kv_offload="host")


def test_page_locked_memory_is_given_back(deep: Path) -> None:
    device = LazyDevice("computation")
    cache = OffloadedCache(SMALL, torch.float32, TOKENS, device=device)
    assert all(device.is_locked(pool) for pool in (*cache.k, *cache.v))
    del cache
    assert device.unlocked == 1


def test_an_engine_allocates_its_plan(deep: Path) -> None:
    """To the byte: slots, the pages that cross, and the homes."""
    llm = load(deep, LazyDevice("computation"), kv_offload="host", device_kv_bytes=3 * LAYER)
    cache, plan = llm.engine.cache, llm.engine.plan
    assert isinstance(cache, OffloadedCache) and isinstance(cache._copies, QueueCopies)
    bounce = cache._copies._bounce
    held = sum(t.nbytes for t in (*cache.device_tensors(), bounce, cache.block_table))
    assert plan.items["kv cache"] + plan.items["kv slots"] == held
    homes = [t for i in cache.streamed for t in (cache.k[i], cache.v[i])]
    assert plan.host == {"kv cache": sum(t.nbytes for t in homes)}
    assert len({t.untyped_storage().data_ptr() for t in homes}) == 1
    assert pages_for(TOKENS) == cache.num_pages
