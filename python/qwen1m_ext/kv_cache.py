"""The paged KV cache: a pool of pages, their users, and the pages of each sequence.

Layout of each layer's `k` and `v`: [num_pages, kv_heads, 128, head_dim]. K is stored rotated at
its Dual Chunk position and unscaled, so pages do not depend on the length of the prompt.

A page that is full can be labelled with a key of its content (`prefix_cache.py`) and have several
users. When the last one leaves, it counts as free but keeps its content until the room is needed:
pages without content go first, then those that nobody has used for the longest time.

In fp8 (e4m3) every KV head of every layer has a scale for K and one for V (`kv_scales.py`). Decode
reads the codes. What reads keys and values in the computing dtype (prefill) is given the pages that
it needs of one layer, widened into a second set of pages, which all layers share.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import ops
from .config import ModelConfig
from .device import CPU, Device
from .errors import MemoryBudgetError
from .fp8 import FP8
from .ops import PAGE_SIZE


def pages_for(num_tokens: int) -> int:
    """Pages that hold this many tokens."""
    return -(-num_tokens // PAGE_SIZE)


def cache_bytes(config: ModelConfig, dtype: torch.dtype, max_tokens: int, max_seqs: int) -> int:
    """Bytes of a `KVCache`: its pages and its block table."""
    pages = pages_for(max_tokens)
    scales = 2 * config.num_layers * config.num_kv_heads * 4 if dtype == FP8 else 0
    return pages * (PAGE_SIZE * config.kv_bytes_per_token(dtype) + max_seqs * 4) + scales


def widened_bytes(config: ModelConfig, dtype: torch.dtype, max_tokens: int) -> int:
    """Bytes of the pages that a `KVCache` in fp8 widens a layer into."""
    return 2 * pages_for(max_tokens) * PAGE_SIZE * config.kv_size * dtype.itemsize


class BlockAllocator:
    """Hands out page numbers; lowest first, so that a young pool touches little memory.

    Every method may be called from any thread.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.evictions = 0  # labelled pages that were given to somebody else
        self._lock = threading.Lock()
        self._free = list(range(num_pages - 1, -1, -1))  # nothing worth keeping in them
        self._idle: OrderedDict[int, None] = OrderedDict()  # labelled, no user; oldest first
        self._users = [0] * num_pages
        self._label: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages without a user."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages without a user whose content could still be reused."""
        return len(self._idle)

    def users(self, page: int) -> int:
        """How many sequences (and pins) hold a page."""
        return self._users[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Raises MemoryBudgetError, and takes none, if there are fewer."""
        with self._lock:
            if count > self.num_free:
                raise MemoryBudgetError(
                    f"kv cache: expected {count} free pages, "
                    f"got {self.num_free} of {self.num_pages}"
                )
            cut = max(0, len(self._free) - count)
            taken = self._free[cut:][::-1]
            del self._free[cut:]
            while len(taken) < count:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
                self.evictions += 1
                taken.append(page)
            for page in taken:
                self._users[page] = 1
            return taken

    def free(self, pages: Sequence[int]) -> None:
        """One user less for each page. The last pages of a chain are the first to be evicted."""
        with self._lock:
            for page in reversed(pages):
                self._users[page] -= 1
                if self._users[page] == 0:
                    if page in self._label:
                        self._idle[page] = None
                    else:
                        self._free.append(page)

    def label(self, page: int, key: bytes) -> None:
        """Say what a page in use holds, unless another page is known to hold the same."""
        with self._lock:
            if key not in self._page and page not in self._label:
                self._label[page], self._page[key] = key, page

    def unlabel(self, page: int) -> None:
        """A page in use is about to change."""
        with self._lock:
            self._forget(page)

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """Become a user of the pages of the leading keys, up to the first that nobody holds."""
        with self._lock:
            pages = []
            for key in keys:
                page = self._page.get(key)
                if page is None:
                    break
                self._idle.pop(page, None)
                self._users[page] += 1
                pages.append(page)
            return pages

    def share_pages(self, pages: Sequence[int]) -> None:
        """Become another user of pages that are in use."""
        with self._lock:
            for page in pages:
                self._users[page] += 1

    def clear(self) -> None:
        """Forget the content of all pages without a user."""
        with self._lock:
            for page in reversed(self._idle):
                self._forget(page)
                self._free.append(page)
            self._idle.clear()

    def _forget(self, page: int) -> None:
        key = self._label.pop(page, None)
        if key is not None:
            del self._page[key]


class KVCache:
    """The pool of one model: tensors for every layer, the allocator and the block tables."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        max_tokens: int,
        max_seqs: int = 1,
        widened: torch.dtype = torch.bfloat16,
        device: Device = CPU,
    ) -> None:
        """Reserve address space for `max_tokens`; the system commits it when it is written.

        Args:
            config: shapes.
            dtype: of keys and values; FP8: with scales, which are 1 until somebody sets them.
            max_tokens: capacity of the pool and the longest sequence.
            max_seqs: sequences that may be open at once.
            widened: the computing dtype, for a cache in fp8.
            device: where keys and values are; the block table is the host's.
        """
        self.device = device
        self.num_pages = pages_for(max_tokens)
        self.max_tokens = self.num_pages * PAGE_SIZE
        shape = (self.num_pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        layers = range(config.num_layers)
        where = device.where
        pairs = [self._allocate(layer, shape, dtype) for layer in layers]
        self.k, self.v = [k for k, _ in pairs], [v for _, v in pairs]
        self.k_scale: Tensor | None = None  # [layers, kv_heads] float32, powers of two: fp8 only
        self.v_scale: Tensor | None = None
        self._widened: tuple[Tensor, Tensor] | None = None
        if dtype == FP8:
            self.k_scale, self.v_scale = (
                torch.ones(config.num_layers, config.num_kv_heads, device=where) for _ in range(2)
            )
            k, v = (device.allocate(shape, widened) for _ in range(2))
            self._widened = k, v
        self.allocator = BlockAllocator(self.num_pages)
        self.block_table = torch.zeros(max_seqs, self.num_pages, dtype=torch.int32)
        self.decode_scratch: Tensor | None = None  # of ops.decode_attention_scratch, on a GPU
        self.decode_rows: int | None = None  # that it suffices for
        self._free_rows = list(range(max_seqs - 1, -1, -1))
        self.page_bytes = PAGE_SIZE * config.kv_bytes_per_token(dtype)

    def _allocate(
        self, layer: int, shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Memory for K and V of a layer."""
        return self.device.allocate(shape, dtype), self.device.allocate(shape, dtype)

    @property
    def free_rows(self) -> int:
        """Sequences that can still be opened."""
        return len(self._free_rows)

    def open(self) -> SequenceCache:
        """A new, empty sequence."""
        try:
            return SequenceCache(self, self._free_rows.pop())
        except IndexError:
            raise MemoryBudgetError(
                f"kv cache: all {self.block_table.shape[0]} sequences are in use"
            ) from None

    def close(self, sequence: SequenceCache) -> None:
        """Give back everything of a sequence."""
        sequence.truncate(0)
        self._free_rows.append(sequence.row)

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Of K and V of a layer, [kv_heads] float32 each; None without fp8."""
        if self.k_scale is None or self.v_scale is None:
            return None, None
        return self.k_scale[layer], self.v_scale[layer]

    def widened(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer in the computing dtype, valid in these pages until the next call.

        pages: int64, each once.

        Without fp8 nothing is copied: all pages of the layer.
        """
        if self._widened is None:
            return self.layer(layer)
        stored = self.layer(layer)
        for wide, codes, scale in zip(self._widened, stored, self.scales(layer), strict=True):
            assert scale is not None, "a cache in fp8 has scales"
            ops.widen_pages(wide, codes, scale, pages)
        return self._widened

    def unrounded(self) -> KVCache:
        """This cache in fp8 as one in the computing dtype, for a pass that needs no rounded keys.

        It has the same pages and sequences. All layers lie in the same memory: each is there from
        its append to that of the next, which is as long as a forward pass needs it.
        """
        assert self._widened is not None, "a cache in fp8"
        k, v = self._widened
        plain = copy.copy(self)
        plain.k, plain.v = [k] * len(self.k), [v] * len(self.v)
        plain.k_scale = plain.v_scale = plain._widened = None
        return plain

    def step(self, spans: Sequence[tuple[SequenceCache, int, int]]) -> AbstractContextManager[None]:
        """Around a forward pass that writes the tokens [begin, end) of each (sequence, begin, end).

        `OffloadedCache` moves layers in it; here all are where they are used.
        """
        return nullcontext()

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer as the ops take them; ask layer after layer, again for each op."""
        return self.k[layer], self.v[layer]

    def release(self, layer: int) -> None:
        """The step does not need a layer any more."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of a page, all layers."""
        with self.device.scope():  # of any thread, in order with the steps
            for pages in (*self.k, *self.v):
                pages[target] = pages[source]

    def settle(self) -> None:
        """Let the host wait until it may read and write the pages of sequences without a step.

        `OffloadedCache` has some in host memory; on a device, reading waits by itself.
        """


class SequenceCache:
    """The pages of one sequence: token i lies in page `pages[i // 128]`, row `i % 128`."""

    def __init__(self, pool: KVCache, row: int) -> None:
        self._pool = pool
        self.row = row  # of the block table
        self.length = 0  # tokens whose keys and values are in the cache, or on their way there
        self.pages: list[int] = []

    @property
    def block_table(self) -> Tensor:
        """[1, max_pages] int32: this sequence's row of the pool's table."""
        return self._pool.block_table[self.row : self.row + 1]

    def append(self, count: int) -> None:
        """Make room for `count` more tokens.

        Raises:
            MemoryBudgetError: too few free pages; nothing has changed.
        """
        end = self.length + count
        partial = self.pages[-1] if self.length % PAGE_SIZE else None
        shared = partial is not None and self._pool.allocator.users(partial) > 1
        new = self._pool.allocator.allocate(pages_for(end) - len(self.pages) + shared)
        if shared and partial is not None:  # others go on reading the page as it is
            self._pool.copy_page(partial, new[0])
            self._pool.allocator.free([self.pages.pop()])
        elif partial is not None:
            self._pool.allocator.unlabel(partial)
        self._extend(new)
        self.length = end

    def share(self, pages: list[int], length: int) -> None:
        """Begin an empty sequence with pages that the caller has taken for it."""
        self._extend(pages)
        self.length = length

    def fork(self, source: SequenceCache, length: int) -> None:
        """Begin an empty sequence with the first `length` tokens of another.

        Full pages are shared. The last, partial one is copied: the source goes on writing in its.
        """
        full, partial = divmod(length, PAGE_SIZE)
        last = self._pool.allocator.allocate(1) if partial else []
        for page in last:
            self._pool.copy_page(source.pages[full], page)
        self._pool.allocator.share_pages(source.pages[:full])
        self.share(source.pages[:full] + last, length)

    def slots(self, begin: int, end: int) -> Tensor:
        """Where the tokens [begin, end) lie: page * 128 + row, int64."""
        tokens = torch.arange(begin, end)
        pages = self._pool.block_table[self.row][tokens // PAGE_SIZE]
        return pages.long() * PAGE_SIZE + tokens % PAGE_SIZE

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        keep = pages_for(length)
        self._pool.allocator.free(self.pages[keep:])
        del self.pages[keep:]
        self.length = min(self.length, length)

    def _extend(self, pages: list[int]) -> None:
        begin = len(self.pages)
        table = self._pool.block_table[self.row]
        table[begin : begin + len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self.pages += pages
