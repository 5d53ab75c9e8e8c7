"""A whole model on the CPU against transformers: prefill and decode of a 135M-parameter shape.

    python bench/model_cpu.py [--pairs 5] [--lengths 4096 32768]

Random weights (30 layers, hidden 576, 9/3 heads x 64, intermediate 1536, vocabulary 49,152, bf16).
The peer is transformers' Qwen2ForCausalLM in its best form: sdpa attention, logits of the last
token only, its own KV cache for decode. Writes bench/results/cpu/model.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from paired import compare, environment, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.memory import peak_bytes

DECODE_STEPS = 16


def small_model(directory: Path) -> Path:
    """A random checkpoint of the shape in the docstring."""
    config = model_config(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=131_072,
        rope_theta=100_000.0, torch_dtype="bfloat16", dual_chunk_attention_config=None,
    )  # fmt: skip
    return write_checkpoint(directory, config, dtype=torch.bfloat16)


def measure(llm: LLM, peer: Any, length: int, pairs: int) -> list[dict[str, Any]]:
    """Rows for prefill and decode at one length."""
    ids = torch.randint(0, 40_000, (length,), generator=torch.Generator().manual_seed(length))
    prompt = {"prompt_token_ids": ids.tolist()}
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def peer_prefill() -> Any:
        with torch.inference_mode():
            return peer(ids[None], use_cache=True, logits_to_keep=1)

    rows = [
        {
            "what": "prefill",
            "tokens": length,
            **compare(lambda: llm.generate(prompt, one), peer_prefill, pairs),
        }
    ]
    # decode: both continue from a prefilled cache, and are cut back to it after each timing
    session = llm.open_session()
    next(stream := llm.stream(prompt, one, session=session))
    stream.close()
    params = SamplingParams(temperature=0, max_tokens=DECODE_STEPS, ignore_eos=True)
    cache = peer_prefill().past_key_values
    tokens = torch.randint(0, 40_000, (DECODE_STEPS,))

    def our_decode() -> None:  # the prompt's last token, then DECODE_STEPS - 1 more
        for _ in llm.stream(prompt, params, session=session):
            pass

    def peer_decode() -> None:
        with torch.inference_mode():
            for token in tokens:
                peer(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache.crop(-DECODE_STEPS)

    row = compare(our_decode, peer_decode, pairs)
    session.close()
    rows.append({"what": f"decode, {DECODE_STEPS} steps", "tokens": length, **row})
    return rows


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32_768])
    args = parser.parse_args()
    import transformers

    where = environment("transformers")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        directory = small_model(Path(folder))
        llm = LLM(directory, max_model_len=max(args.lengths) + 64, skip_tokenizer_init=True)
        peer = transformers.Qwen2ForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        for length in args.lengths:
            for row in measure(llm, peer, length, args.pairs):
                rows.append(row)
                print(json.dumps(row), flush=True)
    where["peak_bytes"] = peak_bytes()
    print(write("cpu/model", where, rows))


if __name__ == "__main__":
    main()
