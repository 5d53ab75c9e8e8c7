"""The position rules of include/qwen1m/dual_chunk.h are those of the reference, pair by pair."""

from __future__ import annotations

import pytest
import torch

from qwen1m_ext import ops
from qwen1m_ext._host import DualChunk
from reference.attention import query_positions


@pytest.mark.parametrize(
    ("chunk_size", "local_size"),
    [(256, 32), (1024, 128), (113, 13), (48, 8), (10, 3), (2, 1), (1, 0), (64, 0), (100, 70)],
)
def test_every_pair(chunk_size: int, local_size: int) -> None:
    """Ranges of the three stages, their positions, and rows of the table they read."""
    chunks = DualChunk(chunk_size, local_size)
    tokens = 4 * chunks.chunk_len + 5
    highest = 0
    for i in range(0, tokens, max(1, tokens // 500)):
        expected = query_positions(i, torch.arange(i + 1), chunk_size, local_size)
        got = torch.empty_like(expected)
        successive, intra = chunks.successive_begin(i), chunks.intra_begin(i)
        got[:successive] = chunks.inter_position()
        got[successive:intra] = chunks.successive_position(i)
        got[intra:] = chunks.intra_position(i)
        assert torch.equal(got, expected), f"token {i}"
        assert chunks.key_position(i) == i % chunks.chunk_len
        highest = max(highest, int(expected.max()), chunks.key_position(i))
        assert highest < chunks.table_rows(i + 1)
    assert highest <= chunk_size  # what the model was trained on


def test_plain_rope_is_one_endless_chunk() -> None:
    """Every position is the token's own, up to and beyond 2^31."""
    chunks = DualChunk(ops.INFINITE_CHUNK)
    for token in (0, 1, 1_000_000, 2**31, 2**40):
        assert chunks.intra_begin(token) == chunks.successive_begin(token) == 0
        assert chunks.intra_position(token) == chunks.key_position(token) == token
        assert chunks.table_rows(token + 1) == token + 1
