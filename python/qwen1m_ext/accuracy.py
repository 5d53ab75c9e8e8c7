"""How far a changed model is from the one it came from: perplexity and KL divergence on real text.

The text is cut into windows; every position of a window but the last predicts the token that
follows. Both models see the same windows.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import RequestError
from .haystack import held_out_text
from .llm import LLM

WINDOW_TOKENS = 512
"""Tokens of a window: logits of a window and of 152,064 words take 300 MB."""


@dataclass(frozen=True)
class Accuracy:
    """A model compared with its reference, over all predicted tokens."""

    tokens: int  # predicted
    reference_perplexity: float
    perplexity: float
    kl_mean: float  # nats per token, KL(reference || model)
    kl_p99: float  # 99 % of the tokens are below
    kl_max: float
    same_top_token: float  # share of positions with the same likeliest token


def compare(reference: LLM, model: LLM, token_ids: Sequence[int]) -> Accuracy:
    """Run both models over a text.

    Raises:
        RequestError: fewer than two tokens.
    """
    if len(token_ids) < 2:
        raise RequestError(f"text: expected at least 2 tokens, got {len(token_ids)}")
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    agreed = 0
    for begin in range(0, len(token_ids) - 1, WINDOW_TOKENS):
        window = list(token_ids[begin : begin + WINDOW_TOKENS])
        if len(window) < 2:
            break
        following = torch.tensor(window[1:])[:, None]
        p, q = (torch.log_softmax(m.logits(window)[:-1].double(), -1) for m in (reference, model))
        losses.append(torch.cat([p.gather(1, following), q.gather(1, following)], 1).neg())
        divergences.append((p.exp() * (p - q)).sum(1).clamp(min=0))
        agreed += int((p.argmax(1) == q.argmax(1)).sum())
    loss, kl = torch.cat(losses), torch.cat(divergences)
    before, after = loss.mean(0).exp().tolist()
    return Accuracy(
        tokens=len(kl),
        reference_perplexity=before,
        perplexity=after,
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        kl_max=float(kl.max()),
        same_top_token=agreed / len(kl),
    )


def read_text(path: Path | None) -> str:
    """A UTF-8 file, or else prose of Python's own documentation.

    Raises:
        RequestError: the file is not UTF-8.
    """
    if path is None:
        return held_out_text(1 << 20, random.Random(0))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"--text {path}: expected UTF-8 text: {error}") from None


def run_report(reference_dir: str | Path, model_dir: Path, text: str, tokens: int) -> Accuracy:
    """Compare two checkpoints, print the result and keep it as `accuracy.json` of the second.

    The second is also compared with its cache in fp8, which is an option of the engine.
    """
    reference = LLM(reference_dir, device="cpu", max_model_len=WINDOW_TOKENS + 1)
    ids = reference.get_tokenizer().encode(text[: 8 * tokens])[:tokens]
    quantised = LLM(model_dir, device="cpu", max_model_len=WINDOW_TOKENS + 1)
    result = compare(reference, quantised, ids)
    print(f"on {result.tokens:,} tokens: {_summary(result)}")
    fp8_cache = LLM(model_dir, device="cpu", max_model_len=WINDOW_TOKENS + 1, kv_cache_dtype="fp8")
    both = compare(reference, fp8_cache, ids)
    print(f"with an fp8 cache as well (--kv fp8): {_summary(both)}")
    report = asdict(result) | {"with_fp8_cache": asdict(both)}
    unfinished = model_dir / ".accuracy.json.unfinished"
    unfinished.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, model_dir / "accuracy.json")
    return result


def _summary(result: Accuracy) -> str:
    return (
        f"perplexity {result.reference_perplexity:.4f} -> {result.perplexity:.4f}, KL "
        f"{result.kl_mean:.2e} nats a token (99 % below {result.kl_p99:.2e}, largest "
        f"{result.kl_max:.2e}), the same likeliest token at {result.same_top_token:.2%}"
    )
