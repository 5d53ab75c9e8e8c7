"""`qwen1m demo`: hide a fact in a very long English text and let the model find it."""

from __future__ import annotations

import secrets
import sys
import time
from typing import Literal

from .choices import RopeName
from .haystack import Sample, is_correct, make_sample
from .memory import format_bytes, peak_bytes
from .request import AttentionName, RequestOutput, SamplingParams
from .terminal import PrefillBar, format_seconds

BOTH_UP_TO = 131_072
"""Longest text that is read twice by default: dense prefill takes a minute or two there."""


def run_demo(
    model: str,
    *,
    tokens: int,
    seed: int | None,
    rope: RopeName,
    depth: float | None = None,
    attention: AttentionName | Literal["both"] | None = None,
) -> bool:
    """Ask for one of 20 facts hidden in a text of `tokens` tokens; report on stdout.

    Args:
        model: directory of a checkpoint with a byte-level tokenizer, such as the demo one.
        tokens: length of the prompt.
        seed: chooses text, facts and place; None: a fresh one, printed so that it can be repeated.
        rope: position rule, see `Engine`.
        depth: where the fact lies, 0 (start) to 1 (end); None: random.
        attention: of the prefill, see `Engine`; "both": dense, then sparse, side by side; None:
            both up to `BOTH_UP_TO` tokens, else sparse; plain RoPE is dense.

    Returns:
        Whether every answer was correct.
    """
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    if attention is None:
        attention = "both" if tokens <= BOTH_UP_TO else "sparse"
        attention = "dense" if rope == "plain" else attention
    sample = make_sample(tokens, seed=seed, depth=depth)
    _introduce(sample, tokens, seed)
    start = time.perf_counter()
    from .llm import LLM

    kinds: list[AttentionName] = ["dense", "sparse"] if attention == "both" else [attention]
    default: AttentionName = "auto" if attention == "both" else attention
    llm = LLM(model, max_model_len=tokens + 64, rope=rope, attention=default)
    config, dca = llm.engine.config, llm.engine.dual_chunk
    trained = config.dual_chunk.original_max_position_embeddings
    positions = "plain RoPE" if dca.is_plain else "Dual Chunk Attention"
    reach = f", trained on {trained:,} tokens: this is {tokens / trained:.3g}x" if trained else ""
    print(f"model     {config.num_layers} layers, {positions}{reach}", flush=True)
    outputs = []
    for kind in kinds:
        params = SamplingParams(temperature=0, max_tokens=16, attention=kind)
        with PrefillBar(tokens) as bar:
            outputs.append(llm.generate(sample.prompt, params, on_progress=bar)[0])
        _report(outputs[-1], sample)
    if len(outputs) == 2:
        _compare(*outputs)
    print(
        f"cost      {format_seconds(time.perf_counter() - start)} in all, "
        f"peak memory {format_bytes(peak_bytes())}"
    )
    correct = all(is_correct(output.outputs[0].text, sample) for output in outputs)
    if dca.is_plain and trained:
        print(
            f"          (plain RoPE is expected to lose what lies farther back than the "
            f"{trained:,} tokens of training; this fact lies {sample.distance:,} back)"
        )
    sys.stdout.flush()
    return correct


def _introduce(sample: Sample, tokens: int, seed: int) -> None:
    print(f"text      {tokens:,} tokens of English prose with {sample.num_keys} hidden facts")
    print(f"seed      {seed}")
    print(f"question  {sample.question}")
    print(
        f"hidden    at {sample.depth:.0%} of the text, {sample.distance:,} tokens before its end",
        flush=True,
    )


def _report(output: RequestOutput, sample: Sample) -> None:
    text, metrics = output.outputs[0].text, output.metrics
    kind = "sparse" if metrics.sparse else "dense"
    recall = "" if metrics.recall is None else f", recall {metrics.recall:.1%}"
    verdict = "CORRECT" if is_correct(text, sample) else "WRONG"
    print(
        f"{kind:<8}  {text.strip().partition(chr(10))[0]}   (expected {sample.answer})   {verdict}"
    )
    print(
        f"          {metrics.prompt_tokens:,} + {metrics.output_tokens} tokens, prefill "
        f"{format_seconds(metrics.prefill_seconds)} "
        f"({metrics.prefill_tokens_per_second:,.0f} tok/s){recall}",
        flush=True,
    )


def _compare(dense: RequestOutput, sparse: RequestOutput) -> None:
    same = dense.outputs[0].token_ids == sparse.outputs[0].token_ids
    ratio = dense.metrics.prefill_seconds / sparse.metrics.prefill_seconds
    print(
        f"sparse    {'the same answer' if same else 'ANOTHER ANSWER'}, prefill {ratio:.1f}x as fast"
    )
