"""Decoding with n-gram speculation on a GPU, against decoding without.

    python bench/e2e/speculative_gpu.py --json FILE [--model 7b] [--lengths 8192 65536]
        [--decode 256] [--pairs 2]

Needs a GPU and a build with CUDA kernels. The demo model reads documentation (little in it comes
twice) and one paragraph of it over and over. Beside it the shapes of a large model, with weights
that make its output known and cost what others cost: each token's successor is fixed, below 64 in a
circle, so that every guess is right, and above it upwards, so that nothing is ever found to guess.
The first is the most that speculation can gain, the second what it costs where it never helps.
Greedy, one request at a time, both engines the same prompts; decode time only (first token to
last), medians of --pairs answers after one that warms up. With the large model's weights no two
logits are near, so its tokens have to be the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import model_gpu
import torch
from model_gpu import CACHES, build, write
from prefill_attention_sdpa import clocks

from qwen1m_ext import SamplingParams, demo_model_path
from qwen1m_ext.choices import missing_gpu
from qwen1m_ext.engine import Engine
from qwen1m_ext.haystack import held_out_text
from qwen1m_ext.tokenizer import Tokenizer
from qwen1m_ext.weights import ModelWeights

CIRCLE = 64
"""Tokens that follow one another again and again."""

QUIET = 1e-3
"""What a layer adds to the residual stream, beside random weights: a token's embedding remains."""

DEMO_PROMPT = 4000


def successors(*arguments: Any) -> ModelWeights:
    """Random weights whose likeliest token after t is t + 1, and 0 at the end of the circle."""
    weights = random_weights(*arguments)
    for layer in weights.layers:
        layer.o.mul_(QUIET)
        layer.down.mul_(QUIET)
    weights.lm_head.copy_(weights.embed.roll(1, 0))
    weights.lm_head[0] = weights.embed[CIRCLE - 1]
    return weights


random_weights = model_gpu.random_weights


def prompts(vocab: int, tokens: int) -> dict[str, list[int]]:
    """Random tokens that lead into the circle, and past it."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(CIRCLE, vocab // 2, (tokens,), generator=generator).tolist()
    circle = list(range(CIRCLE))
    return {
        "a circle": [*ids[: -2 * CIRCLE], *circle, *circle],
        "never the same": [*ids[:-1], vocab // 2],
    }


def answers(engine: Engine, ids: list[int], decode: int, pairs: int) -> dict[str, Any]:
    """Some answers to one prompt: the last one's tokens, and their rate."""
    params = SamplingParams(temperature=0, max_tokens=decode, ignore_eos=True)
    rates, output = [], None
    for _ in range(pairs + 1):
        output = engine.submit(ids, params).result()
        rates.append(output.metrics.decode_tokens_per_second)
    assert output is not None
    return {
        "decode_tokens_per_s": statistics.median(rates[1:]),
        "decode_tokens_per_s_of_each": rates[1:],
        "draft_tokens": output.metrics.draft_tokens,
        "accepted_tokens": output.metrics.accepted_tokens,
        "token_ids": list(output.outputs[0].token_ids),
    }


def compared(
    engines: Any, texts: dict[str, list[int]], decode: int, pairs: int, **facts: Any
) -> list[dict[str, Any]]:
    """A row for each text: the engine with speculation beside the one without."""
    found: dict[str, list[dict[str, Any]]] = {text: [] for text in texts}
    for make in engines:
        engine = make()
        for text, ids in texts.items():
            found[text].append(answers(engine, ids, decode, pairs))
        engine.shutdown()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    rows = []
    for text, (ours, peer) in found.items():
        a, b = ours.pop("token_ids"), peer["token_ids"]
        row = {**facts, "text": text, "prompt_tokens": len(texts[text]), "output_tokens": decode}
        row |= ours
        row["without"] = peer["decode_tokens_per_s"]
        row["ratio"] = ours["decode_tokens_per_s"] / peer["decode_tokens_per_s"]
        row["same_tokens"] = next((i for i in range(len(a)) if a[i] != b[i]), len(a))
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def demo(decode: int, pairs: int) -> list[dict[str, Any]]:
    """The demo model, with guesses as they come."""
    text = held_out_text(DEMO_PROMPT, random.Random(1))
    options: dict[str, Any] = {
        "device": "cuda", "max_model_len": DEMO_PROMPT + decode, "max_num_seqs": 1
    }  # fmt: skip

    def engine(speculative: Any) -> Engine:
        return Engine(demo_model_path(), speculative=speculative, **options)

    tokenizer = Tokenizer(demo_model_path())
    repeated = (text[:400] * DEMO_PROMPT)[:DEMO_PROMPT]
    texts = {
        "documentation": tokenizer.encode(text)[:DEMO_PROMPT],
        "a paragraph repeated": tokenizer.encode(repeated)[:DEMO_PROMPT],
    }
    makers = [lambda s=s: engine(s) for s in ("ngram", None)]
    return compared(makers, texts, decode, pairs, model="demo")


def large(model: str, tokens: int, decode: int, pairs: int) -> list[dict[str, Any]]:
    """A large model's shape, with successors."""

    def engine(speculative: Any) -> Engine:
        with patch("model_gpu.random_weights", successors):
            return build(
                model, tokens + decode + 1, CACHES[model], True, attention="dense",
                speculative=speculative,
            )  # fmt: skip

    config = json.loads((model_gpu.CONFIGS / f"qwen2.5-{model}-instruct-1m.json").read_text())
    makers = [lambda s=s: engine(s) for s in ("ngram", None)]
    texts = prompts(config["vocab_size"], tokens)
    return compared(makers, texts, decode, pairs, model=model, kv=CACHES[model])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(CACHES), default="7b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65_536])
    parser.add_argument("--decode", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    if missing := missing_gpu():
        sys.exit(f"needs a GPU and a build with CUDA kernels: {missing}")
    before = clocks()
    rows = demo(arguments.decode, arguments.pairs)
    for tokens in arguments.lengths:
        rows += large(arguments.model, tokens, arguments.decode, arguments.pairs)
    write(arguments.json, before, rows)
    same = all(r["same_tokens"] == r["output_tokens"] for r in rows if r["model"] != "demo")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
