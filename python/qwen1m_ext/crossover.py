"""From which length on sparse prefill is faster: measured on this machine with this model."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from .engine import Engine
from .errors import RequestError
from .machine import cpu_name
from .prefill_policy import Crossover
from .request import AttentionName, SamplingParams

FIRST_TOKENS = 1024
PAIRS = 3
CLEAR = 1.5
"""The search ends where sparse is this many times faster."""


def crossing(samples: Sequence[dict[str, float]]) -> float | None:
    """The length at which both take equally long, interpolated on logarithmic axes.

    Args:
        samples: ascending lengths, {"tokens", "dense_seconds", "sparse_seconds"}.

    Returns:
        Tokens: the first length if sparse is faster from there on; None if it is not faster at the
        last length.
    """
    gain = [math.log(s["dense_seconds"] / s["sparse_seconds"]) for s in samples]
    if gain[-1] <= 0:
        return None
    last = max((i for i, g in enumerate(gain) if g <= 0), default=-1)
    if last < 0:
        return samples[0]["tokens"]
    low, high = (math.log(s["tokens"]) for s in samples[last : last + 2])
    share = -gain[last] / (gain[last + 1] - gain[last])
    return math.exp(low + share * (high - low))


def measure(
    engine: Engine,
    token_ids: Sequence[int],
    *,
    command: str,
    on_sample: Callable[[dict[str, float]], None] = lambda _: None,
) -> Crossover:
    """Time dense and sparse prefill in turn, at doubled lengths, until sparse is clearly faster.

    Args:
        engine: a model loaded for both, without prefix caching.
        token_ids: a long text; its beginning is used.
        command: how to repeat this, for the record.
        on_sample: told each length's medians.

    Raises:
        RequestError: sparse prefill is not faster at any length of this text.
    """
    samples = []
    for tokens in _lengths(min(len(token_ids), engine.max_model_len - 1)):
        prompt = list(token_ids[:tokens])
        seconds: dict[AttentionName, list[float]] = {"dense": [], "sparse": []}
        for turn in range(PAIRS + 1):  # the first pair warms up
            for name, times in seconds.items():
                params = SamplingParams(temperature=0, max_tokens=1, attention=name)
                output = engine.submit(prompt, params).result()
                if turn:
                    times.append(output.metrics.prefill_seconds)
        sample = {
            "tokens": float(tokens),
            "dense_seconds": sorted(seconds["dense"])[PAIRS // 2],
            "sparse_seconds": sorted(seconds["sparse"])[PAIRS // 2],
        }
        samples.append(sample)
        on_sample(sample)
        if sample["dense_seconds"] > CLEAR * sample["sparse_seconds"]:
            break
    tokens_equal = crossing(samples)
    if tokens_equal is None:
        raise RequestError(
            f"crossover: sparse prefill is not faster up to {samples[-1]['tokens']:,.0f} tokens; "
            "give a longer text, or keep attention=dense"
        )
    return Crossover(
        tokens=math.ceil(tokens_equal),
        machine=cpu_name(),
        dtype=str(engine.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        samples=[{name: round(value, 6) for name, value in s.items()} for s in samples],
        date=datetime.date.today().isoformat(),
        command=command,
    )


def _lengths(limit: int) -> Iterator[int]:
    tokens = FIRST_TOKENS
    while tokens < limit:
        yield tokens
        tokens *= 2
    yield limit
