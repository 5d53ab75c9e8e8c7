"""Retrieval accuracy of a checkpoint, measured with the engine.

Greedy decoding; all digits must match. Every sample is one line of the result file, written at
once: a run that was stopped continues where it was, and a larger --samples adds to what is there.

By default every sample has a haystack of its own. With `--questions N`, N of the keys of each
haystack are asked, and the haystack is prefilled once: cheaper, but the N samples are not
independent. (All prompts of one haystack have the same length and so the same attention
temperature: the shared cache changes nothing but the rounding.)

`--attention sparse` reads the same samples sparsely; samples of both kinds in one result file are
compared, and those whose answers differ are listed.

Samples read with plain RoPE are also counted by how far back the needle lies, in trained lengths.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import qwen1m_ext
from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.config import load_config
from qwen1m_ext.haystack import is_correct, make_sample

MAX_TOKENS = 12  # a space, five digits, a full stop, <|im_end|>, and room for an error
NUM_BINS = 5
SAMPLE = ("rope", "length", "keys", "alike", "seed", "asked")  # what a sample is known by


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the finished samples; a last line cut by a kill is ignored."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"ignored a damaged line of {path}")
    return records


def discordant(records: Iterable[dict[str, Any]]) -> str:
    """Returns, per length, the samples that were answered differently densely and sparsely."""
    pairs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        sample = tuple(record[name] for name in SAMPLE)
        pairs.setdefault(sample, {})[attention_of(record)] = record
    lines: list[str] = []
    for length in sorted({sample[1] for sample in pairs}):
        both = [p for s, p in sorted(pairs.items()) if s[1] == length and len(p) == 2]
        different = [p for p in both if p["dense"]["generated"] != p["sparse"]["generated"]]
        if both:
            lines.append(f"{length} tokens: {len(different)} of {len(both)} answers differ")
        for p in different:
            one = p["dense"]
            lines.append(
                f"  seed {one['seed']}/{one['asked']} depth {one['depth']:.2f}: expected "
                f"{one['answer']}, dense {one['generated']!r}, sparse {p['sparse']['generated']!r}"
            )
    return "\n".join(lines)


def by_distance(records: Iterable[dict[str, Any]], trained: int) -> str:
    """Returns a table of the samples with plain RoPE by the distance of the needle."""
    limits = (1, 2, 4, math.inf)  # in trained lengths
    cells: dict[int, list[list[bool]]] = {}
    for record in records:
        if record["rope"] == "plain":
            distance = (1 - record["depth"]) * record["length"] / trained
            row = cells.setdefault(record["length"], [[] for _ in limits])
            row[next(i for i, limit in enumerate(limits) if distance <= limit)].append(
                record["correct"]
            )
    if not cells:
        return ""
    lines = [
        f"| plain RoPE, length | needle within {trained} tokens | to 2x that | to 4x | beyond |",
        "|---|---|---|---|---|",
    ]
    for length, row in sorted(cells.items()):
        counts = [f"{sum(cell)}/{len(cell)}" if cell else "" for cell in row]
        lines.append(f"| {length} | {' | '.join(counts)} |")
    return "\n".join(lines)


def attention_of(record: dict[str, Any]) -> str:
    """Returns how the prompt was prefilled; results from before sparse prefill are dense."""
    return str(record.get("attention", "dense"))


def summarise(records: Iterable[dict[str, Any]]) -> str:
    """Returns a table of correct / all samples for each length and depth of the needle."""
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for record in records:
        keys = f"{record['keys']} alike" if record["alike"] else f"{record['keys']}"
        name = (record["rope"], attention_of(record), record["length"], keys)
        groups.setdefault(name, []).append(record)
    width = 100 // NUM_BINS
    bins = " | ".join(f"{i * width}-{(i + 1) * width} %" for i in range(NUM_BINS))
    lines = [
        f"| rope | attention | length | keys | correct | accuracy | {bins} | s/sample |",
        "|" + "---|" * (NUM_BINS + 7),
    ]
    for (rope, attention, length, keys), group in sorted(groups.items()):
        cells = []
        for i in range(NUM_BINS):
            inside = [r for r in group if min(int(r["depth"] * NUM_BINS), NUM_BINS - 1) == i]
            cells.append(f"{sum(r['correct'] for r in inside)}/{len(inside)}")
        correct = sum(r["correct"] for r in group)
        seconds = sum(r["seconds"] for r in group) / len(group)
        lines.append(
            f"| {rope} | {attention} | {length} | {keys} "
            f"| {correct}/{len(group)} | {correct / len(group):.3f} | {' | '.join(cells)} "
            f"| {seconds:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    default_model = Path(qwen1m_ext.__file__).parent / "demo_model"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model)
    parser.add_argument("--lengths", default="2048,8192,32768", help="tokens of the prompts")
    parser.add_argument("--samples", type=int, default=40, help="samples of each length")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample")
    parser.add_argument("--keys", type=int, default=20, help="competing keys in a haystack")
    parser.add_argument("--questions", type=int, default=1, help="keys asked of each haystack")
    parser.add_argument("--alike", action="store_true", help="keys may begin alike: harder")
    parser.add_argument("--rope", choices=("dca", "plain"), default="dca")
    parser.add_argument("--attention", choices=("dense", "sparse"), default="dense")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"))
    args = parser.parse_args()

    lengths = [int(length) for length in args.lengths.split(",")]
    done = {
        (r["rope"], attention_of(r), r["length"], r["keys"], r["alike"], r["seed"], r["asked"])
        for r in read(args.out)
    }
    wanted = [
        (length, args.seed + i // args.questions, i % args.questions)
        for length in lengths
        for i in range(args.samples)
    ]
    kind = (args.rope, args.attention)
    todo = [w for w in wanted if (*kind, w[0], args.keys, args.alike, *w[1:]) not in done]
    if todo:
        llm = LLM(
            str(args.model), dtype=args.dtype, max_model_len=max(lengths) + MAX_TOKENS,
            rope=args.rope, attention=args.attention,
        )  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        session = llm.open_session()
    for length, seed, asked in todo:
        sample = make_sample(length, seed=seed, competing_keys=args.keys, asked=asked,
                             alike=args.alike)  # fmt: skip
        start = time.monotonic()
        *_, output = llm.stream(sample.prompt, params, session=session)
        text = output.outputs[0].text
        record = {
            "rope": args.rope, "attention": args.attention, "length": length, "keys": args.keys,
            "seed": seed, "alike": args.alike, "recall": output.metrics.recall,
            "asked": asked, "depth": round(sample.depth, 4), "question": sample.question,
            "answer": sample.answer, "generated": text, "correct": is_correct(text, sample),
            "seconds": round(time.monotonic() - start, 2),
        }  # fmt: skip
        with args.out.open("a") as out:
            out.write(json.dumps(record) + "\n")
        verdict = "ok" if record["correct"] else "WRONG"
        print(
            f"{length} seed {seed}/{asked} depth {sample.depth:.2f}: {verdict} {text!r}", flush=True
        )
    print(summarise(read(args.out)))
    print(discordant(read(args.out)))
    trained = load_config(args.model).dual_chunk.original_max_position_embeddings
    print(by_distance(read(args.out), trained))


if __name__ == "__main__":
    main()
