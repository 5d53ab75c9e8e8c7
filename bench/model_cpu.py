"""A whole model on the CPU against transformers: prefill and decode of a 135M-parameter shape.

    python bench/model_cpu.py [--pairs 5] [--long-pairs 3] [--lengths 4096 32768] [--minutes 60]
        [--layers 30] [--threads 2] [--resume]

Random weights (--layers, hidden 576, 9/3 heads x 64, intermediate 1536, vocabulary 49,152, bf16).
The peer is transformers' Qwen2ForCausalLM in its best form: sdpa attention, logits of the last
token only, its own KV cache for decode. Decode goes on from the caches of the last prefill pair;
both are cut back to the prompt after each timing. Both are warmed up with a prompt of 512 tokens,
and decode with one untimed pair.

A prefill of 32k takes transformers minutes, so lengths above 16k get --long-pairs pairs. Every
timing is printed and bench/results/cpu/model.json is rewritten after every pair: a run that is
stopped, or that has spent --minutes, keeps what it has, and --resume adds the pairs that are
missing. A row says how many pairs it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import RESULTS, computed, environment, seconds, summary, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from lib.checkpoints import model_config, write_checkpoint
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.memory import peak_bytes
from qwen1m_ext.request import RequestMetrics

DECODE_STEPS = 16
LONG_TOKENS = 16_384
NAME = "cpu/model"


def small_model(directory: Path, layers: int) -> Path:
    """A random checkpoint of the shape in the docstring."""
    config = model_config(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=131_072,
        rope_theta=100_000.0, torch_dtype="bfloat16", dual_chunk_attention_config=None,
    )  # fmt: skip
    return write_checkpoint(directory, config, dtype=torch.bfloat16)


class Ours:
    """This engine: a session keeps the cache from one call to the next."""

    def __init__(self, directory: Path, max_tokens: int) -> None:
        # Nothing of one prefill may serve the next.
        self.llm = LLM(
            directory,
            max_model_len=max_tokens,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )
        self.session = self.llm.open_session()

    def run(self, ids: list[int], new_tokens: int) -> RequestMetrics:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        *_, output = self.llm.stream({"prompt_token_ids": ids}, params, session=self.session)
        return output.metrics

    def prefill(self, ids: list[int]) -> None:
        self.session.truncate(0)
        computed(self.run(ids, 1))

    def decode(self, ids: list[int]) -> None:
        self.run(ids, DECODE_STEPS)  # the prompt's last token, then DECODE_STEPS - 1 more


class Peer:
    """transformers; `decode` feeds fixed tokens, which saves it the argmax."""

    def __init__(self, directory: Path) -> None:
        import transformers

        self.model = transformers.Qwen2ForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.tokens = torch.randint(0, 40_000, (DECODE_STEPS, 1, 1))
        self.cache: Any = None

    def prefill(self, ids: list[int]) -> None:
        self.cache = None
        with torch.inference_mode():
            out = self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values

    def decode(self, _: list[int]) -> None:
        with torch.inference_mode():
            for token in self.tokens:
                self.model(token, past_key_values=self.cache, use_cache=True)
            self.cache.crop(-DECODE_STEPS)


class Run:
    """The rows so far, the deadline, and the file that holds both."""

    def __init__(self, rows: list[dict[str, Any]], minutes: float, where: dict[str, Any]) -> None:
        self.rows, self.where = rows, where
        self.start = time.perf_counter()
        self.deadline = self.start + 60 * minutes

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:6.0f} s] {text}", flush=True)

    def row(self, what: str, tokens: int) -> dict[str, Any]:
        for row in self.rows:
            if (row["what"], row["tokens"]) == (what, tokens):
                return row
        self.rows.append({"what": what, "tokens": tokens, "timed_s": []})
        return self.rows[-1]

    def measure(
        self,
        row: dict[str, Any],
        pairs: int,
        ours: Callable[[], object],
        peer: Callable[[], object],
    ) -> None:
        """Add pairs until there are enough; one pair is always taken if there is none."""
        timed = row["timed_s"]
        while len(timed) < pairs and (not timed or time.perf_counter() < self.deadline):
            timed.append([seconds(ours), seconds(peer)])
            row |= summary(timed)
            self.where["peak_bytes"] = peak_bytes()
            write(NAME, self.where, self.rows)
            a, b = timed[-1]
            self.say(
                f"{row['what']}, {row['tokens']} tokens, pair {len(timed)} of {pairs}: "
                f"ours {a:.3f} s, transformers {b:.3f} s, ratio {b / a:.2f}"
            )
        if len(timed) < pairs:
            self.say(f"{row['what']}, {row['tokens']} tokens: out of time after {len(timed)} pairs")


def measure_length(run: Run, ours: Ours, peer: Peer, length: int, pairs: int) -> None:
    """Prefill and decode at one length."""
    ids = torch.randint(0, 40_000, (length,), generator=torch.Generator().manual_seed(length))
    prompt = ids.tolist()
    prefill = run.row("prefill", length)
    decode = run.row(f"decode, {DECODE_STEPS} steps", length)
    run.measure(prefill, pairs, lambda: ours.prefill(prompt), lambda: peer.prefill(prompt))
    missing = max(pairs, 5) - len(decode["timed_s"])
    if missing > 0:
        if peer.cache is None or peer.cache.get_seq_length() != length:
            run.say(f"filling both caches with {length} tokens (resumed after the prefills)")
            ours.prefill(prompt), peer.prefill(prompt)
        ours.decode(prompt), peer.decode(prompt)
        run.measure(decode, max(pairs, 5), lambda: ours.decode(prompt), lambda: peer.decode(prompt))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--long-pairs", type=int, default=3, help="above 16k tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32_768])
    parser.add_argument("--minutes", type=float, default=60, help="start no pair after this long")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true", help="keep the pairs of the last run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    where, rows = environment("transformers") | {"layers": args.layers}, []
    path = RESULTS / f"{NAME}.json"
    if args.resume and path.exists():
        before = json.loads(path.read_text())
        for key in ("cpu", "threads", "build", "versions", "layers"):
            if before["environment"].get(key) != where[key]:
                raise SystemExit(
                    f"--resume: {path} was measured with {key} {before['environment'].get(key)}, "
                    f"but this is {where[key]}"
                )
        where, rows = before["environment"], before["rows"]
    run = Run(rows, args.minutes, where)
    with tempfile.TemporaryDirectory() as folder:
        run.say("writing and loading a random checkpoint")
        directory = small_model(Path(folder), args.layers)
        ours = Ours(directory, max(args.lengths) + DECODE_STEPS)
        peer = Peer(directory)
        run.say("warming up")
        warm_up = list(range(512))
        for side in (ours, peer):
            side.prefill(warm_up)
            side.decode(warm_up)
        peer.cache = None
        for length in args.lengths:
            pairs = args.long_pairs if length > LONG_TOKENS else args.pairs
            measure_length(run, ours, peer, length, pairs)
    for row in rows:
        run.say(
            f"{row['what']:18} {row['tokens']:6} tokens: ours {row['ours_s']:8.3f} s, transformers "
            f"{row['peer_s']:8.3f} s, ratio {row['ratio']:.2f} ({row['ratio_min']:.2f} to "
            f"{row['ratio_max']:.2f}, {row['pairs']} pairs)"
        )
    print(write(NAME, where, rows))


if __name__ == "__main__":
    main()
