"""Tensors in huge pages, for memory that is read from end to end at every token."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_BYTES = 8 << 20
"""Of a tensor: what may be committed beyond what was written, 2 MiB, is a quarter of it at most."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.empty on the CPU; a large tensor asks the system for huge pages.

    The system commits memory when it is written, here 2 MiB at a time instead of 4 KiB. Decode
    reads a large cache faster for it (bench/attention_cpu.py, peer "4 KiB pages").
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < MIN_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    return mapped(size).view(dtype).view(shape)


def mapped(count: int) -> Tensor:
    """[count] uint8 on pages that nothing else is on, huge ones if the system has them."""
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
