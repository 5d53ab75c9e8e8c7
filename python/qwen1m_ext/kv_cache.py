"""The paged KV cache: a pool of pages, an allocator, and the pages of each sequence.

Layout of each layer's `k` and `v`: [num_pages, kv_heads, 128, head_dim]. K is stored rotated at
its Dual Chunk position and unscaled, so pages do not depend on the length of the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import MemoryBudgetError
from .ops import PAGE_SIZE


def pages_for(num_tokens: int) -> int:
    """Pages that hold this many tokens."""
    return -(-num_tokens // PAGE_SIZE)


def cache_bytes(config: ModelConfig, dtype: torch.dtype, max_tokens: int, max_seqs: int) -> int:
    """Bytes of a `KVCache`: its pages and its block table."""
    pages = pages_for(max_tokens)
    return pages * (PAGE_SIZE * config.kv_bytes_per_token(dtype) + max_seqs * 4)


class BlockAllocator:
    """Hands out page numbers; lowest first, so that a young pool touches little memory."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages not in use."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Raises MemoryBudgetError, and takes none, if there are fewer."""
        if count > len(self._free):
            raise MemoryBudgetError(
                f"kv cache: expected {count} free pages, got {len(self._free)} of {self.num_pages}"
            )
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def free(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(reversed(pages))


class KVCache:
    """The pool of one model: tensors for every layer, the allocator and the block tables."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, max_tokens: int, max_seqs: int = 1
    ) -> None:
        """Reserve address space for `max_tokens`; the system commits a page when it is written.

        Args:
            config: shapes.
            dtype: of keys and values.
            max_tokens: capacity of the pool and the longest sequence.
            max_seqs: sequences that may be open at once.
        """
        self.num_pages = pages_for(max_tokens)
        self.max_tokens = self.num_pages * PAGE_SIZE
        shape = (self.num_pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        layers = range(config.num_layers)
        self.k = [torch.empty(shape, dtype=dtype) for _ in layers]
        self.v = [torch.empty(shape, dtype=dtype) for _ in layers]
        self.allocator = BlockAllocator(self.num_pages)
        self.block_table = torch.zeros(max_seqs, self.num_pages, dtype=torch.int32)
        self._free_rows = list(range(max_seqs - 1, -1, -1))
        self.page_bytes = PAGE_SIZE * config.kv_bytes_per_token(dtype)

    def open(self) -> SequenceCache:
        """A new, empty sequence."""
        if not self._free_rows:
            raise MemoryBudgetError(
                f"kv cache: all {self.block_table.shape[0]} sequences are in use"
            )
        return SequenceCache(self, self._free_rows.pop())

    def close(self, sequence: SequenceCache) -> None:
        """Give back everything of a sequence."""
        sequence.truncate(0)
        self._free_rows.append(sequence.row)


class SequenceCache:
    """The pages of one sequence: token i lies in page `pages[i // 128]`, row `i % 128`."""

    def __init__(self, pool: KVCache, row: int) -> None:
        self._pool = pool
        self.row = row  # of the block table
        self.length = 0  # tokens whose keys and values are in the cache
        self.pages: list[int] = []

    @property
    def block_table(self) -> Tensor:
        """[1, max_pages] int32: this sequence's row of the pool's table."""
        return self._pool.block_table[self.row : self.row + 1]

    def append(self, count: int) -> Tensor:
        """Make room for `count` more tokens; returns their slots, [count] int64."""
        end = self.length + count
        new = self._pool.allocator.allocate(max(0, pages_for(end) - len(self.pages)))
        table = self._pool.block_table[self.row]
        table[len(self.pages) : len(self.pages) + len(new)] = torch.tensor(new, dtype=torch.int32)
        self.pages += new
        tokens = torch.arange(self.length, end)
        self.length = end
        return table[tokens // PAGE_SIZE].long() * PAGE_SIZE + tokens % PAGE_SIZE

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        keep = pages_for(length)
        self._pool.allocator.free(self.pages[keep:])
        del self.pages[keep:]
        self.length = min(self.length, length)
