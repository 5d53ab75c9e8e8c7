"""What the tests of an offloaded cache share: a model of five layers, and answers to compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext import LLM, SamplingParams

LAYERS, TOKENS = 5, 1024
PAGE = 2 * 2 * 128 * 16 * 4  # bytes of a page in one layer: K and V, 2 heads x 128 x 16 float32
LAYER = TOKENS // 128 * PAGE
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
NOTED = replace(GREEDY, logprobs=3)


def deep_model(directory: Path) -> Path:
    """A random model of five layers."""
    return write_checkpoint(directory, model_config(num_hidden_layers=LAYERS), gain=1.5)


def load(directory: Path, **options: Any) -> LLM:
    """In chunks of 100 tokens: pages are read half full, and filled."""
    return LLM(directory, **{"max_model_len": TOKENS, "prefill_chunk_tokens": 100, **options})


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def answer(llm: LLM, tokens: list[int], params: SamplingParams = NOTED) -> list[Any]:
    """Tokens and log probabilities of all samples: equal only if logits are, bit by bit."""
    output = llm.generate({"prompt_token_ids": tokens}, params)[0]
    return [(sample.token_ids, sample.logprobs) for sample in output.outputs]
