"""Keys and values beyond the device: layers wait in host memory and come when it is their turn.

As many layers as the budget allows stay on the device. Each of the others has its home in host
memory and passes through one of two slots, which hold a whole layer: while a layer computes in one
slot, the next layer's pages are copied into the other (`offload_copies.py`). What a step writes
goes home before the step ends, so between steps the homes are the whole truth, and everything that
works on them (forks, prefix reuse, sessions and their files) does not know of slots.

A step moves the pages that it uses, once per layer whoever shares them: in, those that hold earlier
tokens; out, those that it wrote. The kernels read the same bytes at the same page numbers, in other
memory: results are equal to the bit.

On a GPU the homes are page-locked memory of the host, allocated once. On a CPU both sides are one
memory, and the budget is an artificial one, for tests.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import huge_pages
from .config import ModelConfig
from .device import CPU, Device, StreamDevice
from .errors import ConfigError
from .kv_cache import KVCache, SequenceCache, pages_for
from .offload_copies import Copies, Pair, QueueCopies, Runs, ThreadCopies, Transfer, joined
from .ops import PAGE_SIZE

SLOTS = 2
"""Layers on their way: one computes while the other is copied."""


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


class OffloadedCache(KVCache):
    """A `KVCache` of which the device holds some layers and two slots. One step at a time."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        max_tokens: int,
        max_seqs: int = 1,
        widened: torch.dtype = torch.bfloat16,
        device: Device = CPU,
        device_bytes: int | None = None,
    ) -> None:
        """As `KVCache`; `device_bytes` as `streamed_layers`.

        Raises:
            ConfigError: a budget below two layers.
            MemoryBudgetError: the host's memory cannot be page-locked.
        """
        check_budget(config, dtype, max_tokens, device_bytes)
        self.streamed = streamed_layers(config, dtype, max_tokens, device_bytes)
        self._away = set(self.streamed)
        self._homes: Iterator[Tensor] | None = None
        super().__init__(config, dtype, max_tokens, max_seqs, widened, device)
        shape = self.k[0].shape
        slots = SLOTS if self.streamed else 0
        self.slots: list[Pair] = [
            (device.allocate(shape, dtype), device.allocate(shape, dtype)) for _ in range(slots)
        ]
        self._copies: Copies = ThreadCopies()
        if self.streamed and isinstance(device, StreamDevice):
            bounce = device.allocate((2 * len(self.streamed), *shape[1:]), dtype)
            self._copies = QueueCopies(device, bounce)
        self._coming: Iterator[int] = iter(())  # layers of the step without a slot so far
        self._here: dict[int, Pair] = {}  # layers that are in a slot, or on their way there
        self._idle = list(self.slots)  # the others, in the order in which they become free
        self._read: Runs = []
        self._written: Runs = []

    @property
    def trace(self) -> list[Transfer] | None:
        """What happens is added to it; on a GPU when `settle` is called."""
        return self._copies.trace

    @trace.setter
    def trace(self, trace: list[Transfer] | None) -> None:
        self._copies.trace = trace

    def device_tensors(self) -> list[Tensor]:
        """All keys and values that are on the device."""
        homes = [(self.k[i], self.v[i]) for i in range(len(self.k)) if i not in self._away]
        return [tensor for pair in (*homes, *self.slots) for tensor in pair]

    @contextmanager
    def step(self, spans: Sequence[tuple[SequenceCache, int, int]]) -> Iterator[None]:
        """See `KVCache.step`. On a CPU raises BackendError if a copy failed."""
        self._read, self._written = _pages(spans)
        self._coming = iter(self.streamed)
        idle, self._idle = self._idle, []
        try:
            for slot in idle:
                self._load_next(slot)
            yield
            for layer in list(self._here):  # written, but attended by nobody
                self.release(layer)
            self._copies.finish()
        except BaseException:
            self._here.clear()
            self._idle = list(self.slots)
            self._copies.give_up()
            raise

    def layer(self, layer: int) -> Pair:
        """See `KVCache.layer`: what is computed on it waits until its pages have come."""
        if layer not in self._away:
            return super().layer(layer)
        assert layer in self._here, "a layer is there in its turn, within a step"
        self._copies.arrive(layer)
        return self._here[layer]

    def release(self, layer: int) -> None:
        """See `KVCache.release`: its slot is for the next layer, once what was written is home."""
        if layer in self._away:
            slot = self._here.pop(layer)
            self._copies.store(layer, slot, (self.k[layer], self.v[layer]), self._written)
            self._load_next(slot)

    def copy_page(self, source: int, target: int) -> None:
        """See `KVCache.copy_page`."""
        homes = [pages for i in self.streamed for pages in (self.k[i], self.v[i])]
        with self.device.scope():
            for i in range(len(self.k)):
                if i not in self._away:
                    self.k[i][target] = self.k[i][source]
                    self.v[i][target] = self.v[i][source]
            self._copies.copy_page(homes, source, target)

    def settle(self) -> None:
        """See `KVCache.settle`."""
        with self.device.scope():
            self._copies.settle()

    def unrounded(self) -> KVCache:
        """See `KVCache.unrounded`: all of its layers lie in one place, none is away."""
        plain = super().unrounded()
        assert isinstance(plain, OffloadedCache)
        plain._away = set()
        return plain

    def _allocate(self, layer: int, shape: Sequence[int], dtype: torch.dtype) -> Pair:
        if layer not in self._away or not isinstance(self.device, StreamDevice):
            return super()._allocate(layer, shape, dtype)
        if self._homes is None:
            count = 2 * len(self.streamed)
            size = count * torch.Size(shape).numel() * dtype.itemsize
            memory = huge_pages.mapped(size)
            weakref.finalize(self, self.device.page_lock(memory)).atexit = False
            self._homes = iter(memory.view(dtype).view(count, *shape))
        return next(self._homes), next(self._homes)

    def _load_next(self, slot: Pair) -> None:
        layer = next(self._coming, None)
        if layer is None:
            self._idle.append(slot)
        else:
            self._copies.load(layer, (self.k[layer], self.v[layer]), slot, self._read)
            self._here[layer] = slot


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
    in_use, changed = (
        joined([(page, page + 1) for page in sorted(pages)]) for pages in (read, written)
    )
    return in_use, changed
