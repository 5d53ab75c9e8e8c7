"""The page allocator and the pages of sequences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen1m_ext.config import load_config
from qwen1m_ext.errors import MemoryBudgetError
from qwen1m_ext.kv_cache import BlockAllocator, KVCache, pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (128, 1), (129, 2), (10**6, 7813)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


def test_allocate_takes_all_or_nothing() -> None:
    allocator = BlockAllocator(3)
    assert allocator.allocate(2) == [0, 1]
    with pytest.raises(MemoryBudgetError, match="expected 2 free pages, got 1 of 3"):
        allocator.allocate(2)
    assert allocator.num_free == 1


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400)), max_size=30))
def test_no_two_tokens_share_a_slot(checkpoint: Path, steps: list[tuple[int, int]]) -> None:
    """Whatever is appended and cut, live tokens have distinct slots and pages come back."""
    pool = KVCache(load_config(checkpoint), torch.float32, 1500, max_seqs=3)
    sequences = [pool.open() for _ in range(3)]
    slots: list[list[int]] = [[], [], []]
    for which, amount in steps:
        sequence = sequences[which]
        if amount <= 200:
            try:
                begin = sequence.length
                sequence.append(amount)
                slots[which] += sequence.slots(begin, begin + amount).tolist()
            except MemoryBudgetError:
                assert sequence.length == len(slots[which])
        else:
            sequence.truncate(amount - 201)
            del slots[which][amount - 201 :]
        live = [slot for one in slots for slot in one]
        assert len(set(live)) == len(live)
        assert sequence.length == len(slots[which])
        for i, slot in enumerate(slots[which]):
            assert int(sequence.block_table[0, i // 128]) * 128 + i % 128 == slot
    for sequence in sequences:
        pool.close(sequence)
    assert pool.allocator.num_free == pool.num_pages


def test_too_many_sequences(checkpoint: Path) -> None:
    pool = KVCache(load_config(checkpoint), torch.float32, 128)
    pool.open()
    with pytest.raises(MemoryBudgetError, match="all 1 sequences are in use"):
        pool.open()
