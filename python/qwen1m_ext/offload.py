"""Keys and values beyond the device: layers wait in host memory and come when it is their turn.

As many layers as the budget allows stay on the device. Each of the others has its home in host
memory and passes through one of two slots, which hold a whole layer: while a layer computes in one
slot, a copy thread brings the next layer's pages into the other. What a step writes goes home
before the step ends, so between steps the homes are the whole truth, and everything that works on
them (forks, prefix reuse, sessions and their files) does not know of slots.

A step moves the pages that it uses, once per layer whoever shares them: in, those that hold earlier
tokens; out, those that it wrote. The kernels read the same bytes at the same page numbers, in other
memory: results are equal to the bit.

On a CPU both sides are one memory, and the budget is an artificial one: it is for tests, and for
what a GPU will need. There the copy thread becomes a stream, and the homes pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .errors import BackendError, ConfigError
from .kv_cache import KVCache, SequenceCache, pages_for
from .ops import PAGE_SIZE

SLOTS = 2
"""Layers on their way: one computes while the other is copied."""

Runs = list[tuple[int, int]]
"""Pages as [begin, end) of neighbours, ascending."""


def layer_bytes(config: ModelConfig, dtype: torch.dtype, max_tokens: int) -> int:
    """Bytes of the keys and values of one layer, and of a slot."""
    pages = pages_for(max_tokens)
    return pages * PAGE_SIZE * config.kv_bytes_per_token(dtype) // config.num_layers


def streamed_layers(
    config: ModelConfig, dtype: torch.dtype, max_tokens: int, device_bytes: int | None
) -> list[int]:
    """The layers whose home is host memory, ascending; the others are spread evenly.

    Args:
        config: shapes.
        dtype: of keys and values.
        max_tokens: capacity of the cache.
        device_bytes: budget of all that the device holds of it; None, or too little: the slots.
    """
    layers = config.num_layers
    held = (device_bytes or 0) // layer_bytes(config, dtype, max_tokens)
    if held >= layers:
        return []
    stay = max(0, held - SLOTS)
    # the first one stays if any does: the first copy of a step is then hidden, too
    staying = {i * layers // stay for i in range(stay)}
    return [layer for layer in range(layers) if layer not in staying]


def check_options(kv_offload: str | None, device_bytes: int | None) -> None:
    """Refuse what is not understood, or is without effect. Raises ConfigError."""
    if kv_offload not in (None, "host"):
        raise ConfigError(f"kv_offload: expected host or None, got {kv_offload!r}")
    if device_bytes is not None and kv_offload is None:
        raise ConfigError(
            f"device_kv_bytes: expected kv_offload beside it, got {device_bytes} alone"
        )


def check_budget(
    config: ModelConfig, dtype: torch.dtype, max_tokens: int, device_bytes: int | None
) -> None:
    """Refuse a budget that does not hold the slots. Raises ConfigError."""
    least = min(SLOTS, config.num_layers) * layer_bytes(config, dtype, max_tokens)
    if device_bytes is not None and device_bytes < least:
        raise ConfigError(
            f"device_kv_bytes: expected at least {least} (two layers of {max_tokens} tokens), "
            f"got {device_bytes}; a shorter max_model_len needs less"
        )


@dataclass(frozen=True)
class Transfer:
    """What happened to a layer's pages, for traces: seconds of `time.perf_counter`."""

    kind: Literal["load", "store", "wait"]  # wait: of the computation, for a load or a store
    layer: int
    begin: float
    end: float
    num_bytes: int = 0


class OffloadedCache(KVCache):
    """A `KVCache` of which the device holds some layers and two slots. One step at a time."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        max_tokens: int,
        max_seqs: int = 1,
        widened: torch.dtype = torch.bfloat16,
        device_bytes: int | None = None,
    ) -> None:
        """As `KVCache`; `device_bytes` as `streamed_layers`. Raises ConfigError."""
        check_budget(config, dtype, max_tokens, device_bytes)
        super().__init__(config, dtype, max_tokens, max_seqs, widened)
        self.streamed = streamed_layers(config, dtype, max_tokens, device_bytes)
        slots = SLOTS if self.streamed else 0
        self.slots = [
            (torch.empty_like(self.k[0]), torch.empty_like(self.v[0])) for _ in range(slots)
        ]
        self.trace: list[Transfer] | None = None
        # one worker: a slot's store is done before its next load, and a load sees earlier stores
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="kv-offload")
        self._away = set(self.streamed)
        self._coming: Iterator[int] = iter(())  # layers of the step without a slot so far
        self._loads: dict[int, tuple[tuple[Tensor, Tensor], Future[None]]] = {}
        self._stores: list[tuple[int, Future[None]]] = []
        self._read: Runs = []
        self._written: Runs = []

    def device_tensors(self) -> list[Tensor]:
        """All keys and values that are on the device."""
        homes = [(self.k[i], self.v[i]) for i in range(len(self.k)) if i not in self._away]
        return [tensor for pair in (*homes, *self.slots) for tensor in pair]

    @contextmanager
    def step(self, spans: Sequence[tuple[SequenceCache, int, int]]) -> Iterator[None]:
        """See `KVCache.step`. Raises BackendError if a copy failed."""
        self._read, self._written = _pages(spans)
        self._coming = iter(self.streamed)
        try:
            for slot in self.slots:
                self._load_next(slot)
            yield
            for layer in list(self._loads):  # written, but attended by nobody
                self.release(layer)
            for layer, store in self._stores:
                self._finish("store", layer, store)
        finally:  # also of a step that was given up: no copy goes on behind it
            copies = [load for _, load in self._loads.values()]
            copies += [store for _, store in self._stores]
            for copy in copies:
                copy.cancel()
            wait(copies)
            self._loads.clear()
            self._stores.clear()

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `KVCache.layer`: waits until the layer's pages have come."""
        if layer not in self._away:
            return super().layer(layer)
        assert layer in self._loads, "a layer is there in its turn, within a step"
        slot, load = self._loads[layer]
        self._finish("load", layer, load)
        return slot

    def release(self, layer: int) -> None:
        """See `KVCache.release`: its slot is for the next layer, once what was written is home."""
        if layer in self._away:
            slot, _ = self._loads.pop(layer)
            home = self.k[layer], self.v[layer]
            store = self._copies.submit(self._copy, "store", layer, slot, home, self._written)
            self._stores.append((layer, store))
            self._load_next(slot)

    def unrounded(self) -> KVCache:
        """See `KVCache.unrounded`: all of its layers lie in one place, none is away."""
        plain = super().unrounded()
        assert isinstance(plain, OffloadedCache)
        plain._away = set()
        return plain

    def _load_next(self, slot: tuple[Tensor, Tensor]) -> None:
        layer = next(self._coming, None)
        if layer is not None:
            home = self.k[layer], self.v[layer]
            load = self._copies.submit(self._copy, "load", layer, home, slot, self._read)
            self._loads[layer] = slot, load

    def _finish(self, kind: str, layer: int, copy: Future[None]) -> None:
        """Wait for a copy."""
        begin, waited = time.perf_counter(), not copy.done()
        try:
            copy.result()
        except Exception as error:
            raise BackendError(
                f"kv offload: the {kind} of layer {layer} failed: {error}"
            ) from error
        if waited:
            self._note("wait", layer, begin)

    def _copy(
        self,
        kind: Literal["load", "store"],
        layer: int,
        source: Iterable[Tensor],
        target: Iterable[Tensor],
        runs: Runs,
    ) -> None:
        """On the copy thread. NumPy copies on one core and leaves torch's threads to the layers."""
        begin, size = time.perf_counter(), 0
        for old, new in zip(source, target, strict=True):
            from_bytes, to_bytes = (t.view(torch.uint8).numpy() for t in (old, new))
            for first, end in runs:
                np.copyto(to_bytes[first:end], from_bytes[first:end])
                size += to_bytes[first:end].nbytes
        self._note(kind, layer, begin, size)

    def _note(
        self, kind: Literal["load", "store", "wait"], layer: int, begin: float, size: int = 0
    ) -> None:
        if self.trace is not None:
            self.trace.append(Transfer(kind, layer, begin, time.perf_counter(), size))


def _pages(spans: Sequence[tuple[SequenceCache, int, int]]) -> tuple[Runs, Runs]:
    """The pages that hold tokens from before a step, and those that it writes."""
    read: set[int] = set()
    written: set[int] = set()
    begins: dict[int, int] = {}
    for sequence, begin, end in spans:
        # a later segment of a sequence reads what the one before it writes
        old = begins.setdefault(sequence.row, begin)
        read.update(sequence.pages[: pages_for(old)])
        written.update(sequence.pages[begin // PAGE_SIZE : pages_for(end)])
    return _runs(read), _runs(written)


def _runs(pages: set[int]) -> Runs:
    runs: Runs = []
    for page in sorted(pages):
        if runs and runs[-1][1] == page:
            runs[-1] = runs[-1][0], page + 1
        else:
            runs.append((page, page + 1))
    return runs
