"""`qwen1m demo`: hide a fact in a very long English text and let the model find it."""

from __future__ import annotations

import secrets
import sys
import time

from .engine import RopeName
from .haystack import Sample, is_correct, make_sample
from .memory import format_bytes, peak_bytes
from .request import SamplingParams
from .terminal import PrefillBar, format_seconds


def run_demo(
    model: str, *, tokens: int, seed: int | None, rope: RopeName, depth: float | None = None
) -> bool:
    """Ask for one of 20 facts hidden in a text of `tokens` tokens; report on stdout.

    Args:
        model: directory of a checkpoint with a byte-level tokenizer, such as the demo one.
        tokens: length of the prompt.
        seed: chooses text, facts and place; None: a fresh one, printed so that it can be repeated.
        rope: position rule, see `Engine`.
        depth: where the fact lies, 0 (start) to 1 (end); None: random.

    Returns:
        Whether the answer was correct.
    """
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    sample = make_sample(tokens, seed=seed, depth=depth)
    _introduce(sample, tokens, seed)
    start = time.perf_counter()
    from .llm import LLM

    llm = LLM(model, max_model_len=tokens + 64, rope=rope)
    config, dca = llm.engine.config, llm.engine.dual_chunk
    trained = config.dual_chunk.original_max_position_embeddings
    positions = "plain RoPE" if dca.is_plain else "Dual Chunk Attention"
    reach = f", trained on {trained:,} tokens: this is {tokens / trained:.3g}x" if trained else ""
    print(f"model     {config.num_layers} layers, {positions}{reach}", flush=True)
    params = SamplingParams(temperature=0, max_tokens=16)
    with PrefillBar(tokens) as bar:
        output = llm.generate(sample.prompt, params, on_progress=bar)[0]
    seconds = time.perf_counter() - start
    text, metrics = output.outputs[0].text, output.metrics
    correct = is_correct(text, sample)
    print(f"answer    {text.strip()}", f"(expected {sample.answer})", sep="   ")
    print(f"result    {'CORRECT' if correct else 'WRONG'}")
    print(
        f"cost      {metrics.prompt_tokens:,} + {metrics.output_tokens} tokens, "
        f"{format_seconds(seconds)} in all, "
        f"prefill {metrics.prefill_tokens_per_second:,.0f} tok/s, "
        f"peak memory {format_bytes(peak_bytes())}"
    )
    if not correct and rope == "plain":
        print("          (plain RoPE is expected to fail beyond the trained length)")
    sys.stdout.flush()
    return correct


def _introduce(sample: Sample, tokens: int, seed: int) -> None:
    print(f"text      {tokens:,} tokens of English prose with {sample.num_keys} hidden facts")
    print(f"seed      {seed}")
    print(f"question  {sample.question}")
    print(f"hidden    at {sample.depth:.0%} of the text", flush=True)
