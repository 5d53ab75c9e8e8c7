"""A model trained on 256 tokens reads 1024 of them: with Dual Chunk Attention, not without.

The checkpoint and its recipe are in tests/fixtures/toy256. Perplexity is taken over the last 64
bytes of held-out windows of 1024 bytes, with the 256 or the 1024 bytes up to the end as the prompt:
the same bytes are predicted in both, so only the length of the context differs.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qwen1m_ext import LLM, SamplingParams

FIXTURE = Path(__file__).parents[1] / "fixtures" / "toy256"
TRAINED, LONG, SCORED = 256, 1024, 64  # tokens, which are bytes


def load(rope: str) -> LLM:
    """The toy model in float32."""
    return LLM(FIXTURE, dtype="float32", max_model_len=2048, rope=rope, skip_tokenizer_init=True)


def perplexity(llm: LLM, context: int) -> float:
    """Per byte, of the last SCORED bytes of each held-out window, given `context` bytes."""
    text = (FIXTURE / "heldout.txt").read_bytes()
    windows = [list(text[at : at + LONG]) for at in range(0, len(text), LONG)]
    assert len(windows) >= 20 and all(len(window) == LONG for window in windows)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": window[-context:]} for window in windows]
    total = 0.0
    for output in llm.generate(prompts, params):
        assert output.prompt_logprobs is not None
        scored = list(zip(output.prompt_logprobs, output.prompt_token_ids, strict=True))[-SCORED:]
        total += sum(entry[token].logprob for entry, token in scored if entry is not None)
    return math.exp(-total / (SCORED * len(windows)))


@pytest.fixture(scope="module")
def trained_level() -> float:
    """Perplexity at the trained length, where both rules are the same."""
    level = perplexity(load("dca"), TRAINED)
    assert level < 6  # it has learned: bytes of this text alone are worth about 25
    assert perplexity(load("plain"), TRAINED) == pytest.approx(level, rel=1e-4)
    return level


def test_dual_chunk_attention_stays_flat(trained_level: float) -> None:
    """Four times the trained length costs nothing."""
    assert perplexity(load("dca"), LONG) <= 1.1 * trained_level


def test_plain_rope_breaks(trained_level: float) -> None:
    """Without the rules the same weights are lost: what the test above passes is not free."""
    assert perplexity(load("plain"), LONG) > 10 * trained_level
