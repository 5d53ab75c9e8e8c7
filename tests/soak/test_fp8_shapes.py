"""fp8 weights and an fp8 cache with the hidden size and the heads of the 7B and 14B models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext import LLM
from qwen1m_ext.accuracy import compare, read_text
from qwen1m_ext.quantize import quantize_checkpoint

SHAPES = {"7b": (3584, 28, 4), "14b": (5120, 40, 8)}  # hidden, query heads, KV heads


@pytest.mark.soak
@pytest.mark.parametrize("size", SHAPES)
def test_divergence_of_random_layers(size: str, tmp_path: Path) -> None:
    """Two random layers on 1,024 tokens of text; docs/numerics.md states the figures."""
    hidden, q_heads, kv_heads = SHAPES[size]
    config = model_config(
        hidden_size=hidden, num_attention_heads=q_heads, num_key_value_heads=kv_heads,
        intermediate_size=3456, torch_dtype="bfloat16", tie_word_embeddings=False,
        dual_chunk_attention_config={"chunk_size": 256, "local_size": 64,
                                     "original_max_position_embeddings": 256},
    )  # fmt: skip
    source = write_checkpoint(tmp_path / "bf16", config, dtype=torch.bfloat16)
    quantize_checkpoint(source, tmp_path / "fp8")
    before, after = (LLM(tmp_path / name, max_model_len=514) for name in ("bf16", "fp8"))
    ids = before.get_tokenizer().encode(read_text(None)[:1024])
    result = compare(before, after, ids)
    print(result)
    assert 1e-5 < result.kl_mean < 2e-3 and result.kl_max < 1e-2
    cached = compare(before, LLM(source, max_model_len=514, kv_cache_dtype="fp8"), ids)
    print(cached)
    assert 1e-5 < cached.kl_mean < 5e-4 and cached.kl_max < 5e-3
