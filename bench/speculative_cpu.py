"""Decoding with n-gram speculation against decoding without, on the demo model.

    python bench/speculative_cpu.py [--pairs 5] [--tokens 300] [--prompt 4000]

Two texts: documentation (little in it comes twice) and one paragraph of it over and over. Greedy,
one request at a time, decode time only (first token to last). Both engines run in turn in one
process; the outputs are compared up to the first token that differs, which bf16 allows at two
nearly equal logits. Writes bench/results/cpu/speculative.json.
"""

from __future__ import annotations

import argparse
import random

import torch
from paired import environment, summary, write

from qwen1m_ext import LLM, SamplingParams, demo_model_path
from qwen1m_ext.haystack import held_out_text


def main() -> None:
    """Time pairs for both texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--prompt", type=int, default=4000)
    args = parser.parse_args()
    facts = environment()
    length = args.prompt + args.tokens
    ours, peer = (
        LLM(demo_model_path(), max_model_len=length, speculative=s) for s in ("ngram", None)
    )
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    text = held_out_text(args.prompt, random.Random(1))
    rows = []
    for name, prompt in (
        ("documentation", text),
        ("a paragraph repeated", (text[:400] * args.prompt)[: args.prompt]),
    ):
        timed, same, output = [], 0, None
        for pair in range(args.pairs + 1):
            output, plain = (llm.generate(prompt, params)[0] for llm in (ours, peer))
            if pair:  # the first warms up
                timed.append((output.metrics.decode_seconds, plain.metrics.decode_seconds))
            a, b = output.outputs[0].token_ids, plain.outputs[0].token_ids
            same = next((i for i in range(len(a)) if a[i] != b[i]), len(a))
        assert output is not None
        m = output.metrics
        row = {
            "text": name, "prompt_tokens": m.prompt_tokens, "output_tokens": m.output_tokens,
            "same_tokens": same, "draft_tokens": m.draft_tokens,
            "accepted_tokens": m.accepted_tokens, **summary(timed),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:22} ratio {row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            f", {m.accepted_tokens} of {m.draft_tokens} guesses right, first {same} tokens alike"
        )
    print(write("cpu/speculative", facts, rows))


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main()
