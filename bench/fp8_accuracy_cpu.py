"""What a cache in fp8 and fp8 weights cost in accuracy: facts found, KL divergence, on the CPU.

    python bench/fp8_accuracy_cpu.py [--samples 20] [--length 8192] [--tokens 16384]
        [--heads 7b 14b] [--random-tokens 1024] [--threads 2]

The demo model: `samples` haystacks with a fact, each read with a bf16 cache, with an fp8 cache, and
with fp8 weights as well; and the divergence of next-token distributions on held-out text. Random
models of two layers with the heads of the 7B and 14B models: the divergence, also with a key bias
of 300 in a channel of each head that turns fast or slowly with the position. Nothing is timed.
Writes bench/results/cpu/fp8_accuracy.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from paired import environment, write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from lib.checkpoints import model_config, random_tensors, write_checkpoint, write_weights
from qwen1m_ext import LLM, SamplingParams, demo_model_path
from qwen1m_ext.accuracy import compare, read_text
from qwen1m_ext.haystack import is_correct, make_sample
from qwen1m_ext.quantize import quantize_checkpoint

# Hidden size, query heads, KV heads.
SHAPES = {"7b": (3584, 28, 4), "14b": (5120, 40, 8), "small": (256, 2, 1)}
HEAD_DIM = 128
BIASED = {"": None, "key bias 300, slowest channel": 63, "key bias 300, fastest channel": 0}
KINDS = ("bf16 cache", "fp8 cache", "fp8 weights", "fp8 cache and weights")


def engines(source: Path, folder: Path, max_model_len: int) -> dict[str, LLM]:
    """One engine of each kind."""
    quantised = folder / "fp8"
    quantize_checkpoint(source, quantised)
    return {
        kind: LLM(
            quantised if "weights" in kind else source,
            kv_cache_dtype="fp8" if "fp8 cache" in kind else "auto",
            max_model_len=max_model_len,
            attention="dense",
            max_num_seqs=4,
        )
        for kind in KINDS
    }


def divergences(models: dict[str, LLM], ids: list[int]) -> list[dict[str, Any]]:
    """Every kind against the bf16 cache."""
    reference = models["bf16 cache"]
    rows = []
    for kind in KINDS[1:]:
        rows.append({"kind": kind, **asdict(compare(reference, models[kind], ids))})
        print(f"  {kind:24} KL {rows[-1]['kl_mean']:.2e}", flush=True)
    return rows


def demo(samples: int, length: int, tokens: int) -> list[dict[str, Any]]:
    """Facts found by the demo model, and its divergence."""
    print("demo model", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        models = engines(Path(demo_model_path()), Path(folder), length + 64)
        ids = models["bf16 cache"].get_tokenizer().encode(read_text(None)[:tokens])
        rows = divergences(models, ids)
        greedy = SamplingParams(temperature=0, max_tokens=12)
        texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
        found = dict.fromkeys(KINDS, 0)
        for seed in range(samples):
            sample = make_sample(length, seed=seed)
            for kind, llm in models.items():
                text = llm.generate(sample.prompt, greedy)[0].outputs[0].text
                texts[kind].append(text)
                found[kind] += is_correct(text, sample)
        for kind in KINDS:
            same = sum(a == b for a, b in zip(texts[kind], texts["bf16 cache"], strict=True))
            rows.append({"kind": kind, "length": length, "samples": samples,
                         "found": found[kind], "same_text": same})  # fmt: skip
            print(f"  {kind:24} {found[kind]}/{samples} found, {same} the same text", flush=True)
    return [{"model": "demo", **row} for row in rows]


def random_model(size: str, bias: str, tokens: int) -> list[dict[str, Any]]:
    """Two random layers with the heads of a published model, on `tokens` bytes of text."""
    hidden, q_heads, kv_heads = SHAPES[size]
    print(f"random, heads of {size} {bias}", flush=True)
    config = model_config(
        hidden_size=hidden, num_attention_heads=q_heads, num_key_value_heads=kv_heads,
        intermediate_size=3456, torch_dtype="bfloat16", tie_word_embeddings=False,
        rope_theta=1e7,
        dual_chunk_attention_config={"chunk_size": 256, "local_size": 64,
                                     "original_max_position_embeddings": 256},
    )  # fmt: skip
    channel = BIASED[bias]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "bf16"
        write_checkpoint(source, config, dtype=torch.bfloat16)
        if channel is not None:
            tensors = random_tensors(config)
            for layer in range(2):
                name = f"model.layers.{layer}.self_attn.k_proj.bias"
                tensors[name].view(kv_heads, HEAD_DIM)[:, channel] = 300.0
            write_weights(source, {name: t.bfloat16() for name, t in tensors.items()})
        models = engines(source, Path(folder), 513)
        ids = models["bf16 cache"].get_tokenizer().encode(read_text(None)[:tokens])
        return [{"model": f"random {size}", "bias": bias, **r} for r in divergences(models, ids)]


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=16_384, help="of the demo model's text")
    parser.add_argument("--heads", nargs="*", choices=SHAPES, default=["7b", "14b"])
    parser.add_argument(
        "--random-tokens", type=int, default=1024, help="of the random models' text"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = demo(args.samples, args.length, args.tokens)
    for size in args.heads:
        for bias in BIASED:
            rows += random_model(size, bias, args.random_tokens)
    print(write("cpu/fp8_accuracy", environment(), rows))


if __name__ == "__main__":
    main()
