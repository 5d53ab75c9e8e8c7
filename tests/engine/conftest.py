"""A small checkpoint for the tests of the Python layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.checkpoints import write_checkpoint
from qwen1m_ext import LLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random 2-layer model whose chunks are 48 tokens long."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), gain=2.0)


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> LLM:
    """That model in float32."""
    return LLM(checkpoint, max_model_len=1024, prefill_chunk_tokens=100)
