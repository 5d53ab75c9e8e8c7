"""The order of an offloaded cache's copies: whatever it allows, the bytes are the same.

Copies run on queues of their own, and on these devices (`lib/lazy_device.py`) as late, or as early,
as the events allow. Programs of steps, forks and host accesses are run beside a plain cache;
without any one of the waits in `QueueCopies` one of them gives something else.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.lazy_device import AHEAD, LazyDevice, host_reads_wait
from qwen1m_ext import offload, offload_copies
from qwen1m_ext.config import read_config
from qwen1m_ext.device import CudaDevice
from qwen1m_ext.errors import MemoryBudgetError
from qwen1m_ext.kv_cache import KVCache, SequenceCache
from qwen1m_ext.offload import OffloadedCache, layer_bytes
from qwen1m_ext.offload_copies import QueueCopies, Transfer
from qwen1m_ext.ops import PAGE_SIZE

CONFIGS = Path(__file__).parent.parent / "fixtures" / "configs"
SMALL = replace(
    read_config(CONFIGS / "qwen2.5-7b-instruct-1m.json"), num_layers=5, num_kv_heads=1, head_dim=8
)
LAYERS, TOKENS = 5, 1024


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
PAGE = PAGE_SIZE * 8 * 4  # bytes of K, or of V, in a layer of SMALL


def reads_what_a_plain_cache_has(ahead: Any, seed: int, copies: Any = QueueCopies) -> bool:
    tokens, seqs = 24 * PAGE_SIZE, 24
    want = Program(KVCache(SMALL, torch.float32, tokens, seqs), seed).run(MOVES)
    device = LazyDevice(ahead)
    with host_reads_wait(device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "QueueCopies", copies)
        patch.setitem(copies.load.__globals__, "BRIDGE_BYTES", PAGE * (seed % 3))
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
    if re.search(r"wait\([^:]*\)$|self\.finish\(\)|fromkeys|_device\.record\(\)\.synchronize", line)
]  # fmt: skip


def changed(line: int, to: str) -> Any:
    """`QueueCopies` with another line in place of one."""
    indent = SOURCE[line][: -len(SOURCE[line].lstrip())]
    lines = [*SOURCE[:line], indent + to, *SOURCE[line + 1 :]]
    names = dict(vars(offload_copies))
    exec("\n".join(lines), names)
    return names["QueueCopies"]


def fails(copies: Any) -> bool:
    """In one of the programs, one way round or the other."""
    return not all(
        reads_what_a_plain_cache_has(ahead, seed, copies) for ahead in AHEAD for seed in SEEDS
    )


@pytest.mark.parametrize("line", WAITS, ids=[SOURCE[i].strip() for i in WAITS])
def test_every_wait_is_needed(line: int) -> None:
    """Planted errors: each wait left out, in turn."""
    assert fails(changed(line, "pass"))


def test_a_store_must_not_bridge_gaps() -> None:
    """Planted as well: what is in a slot beside the runs is not the truth."""
    line = next(i for i, line in enumerate(SOURCE) if "stored = self._move(" in line)
    assert fails(changed(line, SOURCE[line].strip().replace("runs)", "joined(runs, 3))")))


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
        want = [(n, pages * page) for n in range(LAYERS) for pages in sizes]
        last = [(LAYERS - 1, 0)] * 2 if kind == "wait" else []  # for the stores of a step
        assert sorted(moved) == sorted([*want, *last])
    assert all(t.begin <= t.end for t in trace)
    ends = {(t.kind, t.layer): t for t in trace}  # of the second step
    for layer in range(LAYERS - 1):
        assert ends["load", layer].end <= ends["wait", layer].end <= ends["store", layer].begin


# --- the calls of CUDA ----------------------------------------------------------------------------


class Calls:
    """`torch.cuda`, as far as `CudaDevice` uses it, done at once and noted by stream."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, str, int]] = []  # stream, what, its number
        self.streams = self.events = 0
        self.current = [-1]
        self.registered: dict[int, int] = {}
        calls = self

        class Stream:
            def __init__(self, where: torch.device) -> None:
                self.number, calls.streams = calls.streams, calls.streams + 1

            def wait_event(self, event: Any) -> None:
                calls.seen.append((self.number, "wait", event.number))

        class Event:
            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                assert blocking
                self.number, calls.events = calls.events, calls.events + 1

            def record(self, stream: Stream) -> None:
                calls.seen.append((stream.number, "record", self.number))

            def synchronize(self) -> None: ...

        @contextmanager
        def stream(stream: Stream) -> Iterator[None]:
            calls.current.append(stream.number)
            yield
            calls.current.pop()

        copy_ = Tensor.copy_

        def noted_copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if non_blocking:
                calls.seen.append((calls.current[-1], "copy", self.nbytes))
            return copy_(self, source)

        def register(address: int, size: int, flags: int) -> int:
            calls.registered[address] = size
            return 0

        runtime = SimpleNamespace(
            cudaHostRegister=register,
            cudaHostUnregister=calls.registered.pop,
            cudaGetErrorString=lambda error: f"error {error}",
        )
        self.runtime = runtime
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": stream,
            "cudart": lambda: runtime,
            "synchronize": lambda where: None,
            "get_device_properties": lambda index: SimpleNamespace(multi_processor_count=4),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Tensor, "copy_", noted_copy)


def test_streams_and_events_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream 0 computes, 1 loads, 2 stores; two steps of two layers, both through the slots."""
    calls = Calls(monkeypatch)
    device = CudaDevice()
    device.where = torch.device("cpu")
    config = replace(SMALL, num_layers=2)
    cache = OffloadedCache(config, torch.float32, 256, 2, device=device)
    assert list(calls.registered.values()) == [2 * layer_bytes(config, torch.float32, 256)]
    sequence = cache.open()
    for begin, end in ((0, 100), (100, 101)):
        sequence.append(end - begin)
        with device.scope(), cache.step([(sequence, begin, end)]):
            for layer in range(2):
                cache.layer(layer)
                cache.release(layer)
    name = {0: "computes", 1: "loads", 2: "stores"}
    at: dict[int, str] = {}
    story = []
    for stream, what, number in calls.seen:
        if what == "record":
            at[number] = name[stream]
        elif what == "wait":
            story.append(f"{name[stream]}: waits for what {at[number]}")
        else:
            story.append(f"{name[stream]}: {number // PAGE} page")
    layer = [
        "computes: waits for what loads",
        "stores: waits for what computes",
        *["stores: 1 page"] * 2,
    ]
    ended = "computes: waits for what stores"
    load = ["loads: waits for what stores", *["loads: 1 page"] * 2]
    assert story == [*layer, *layer, ended, *load, *load, *layer, *layer, ended]
    del cache, sequence
    assert calls.registered == {}


def test_page_locked_memory_is_given_back() -> None:
    device = LazyDevice("computation")
    cache = OffloadedCache(SMALL, torch.float32, TOKENS, device=device)
    assert all(device.is_locked(pool) for pool in (*cache.k, *cache.v))
    del cache
    assert device.unlocked == 1


def test_page_locking_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    calls.runtime.cudaHostRegister = lambda *_: 2
    words = r"4096 bytes \(4.0 KiB\) could not be page-locked: error 2"
    with pytest.raises(MemoryBudgetError, match=words):
        CudaDevice().page_lock(torch.empty(4096, dtype=torch.uint8))
