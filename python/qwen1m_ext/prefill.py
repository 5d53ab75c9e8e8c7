"""The long-prompt loop: a prompt goes through the model in chunks, with progress and an ETA."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Rotary, TokenSpan
from .config import ModelConfig
from .kv_cache import KVCache, SequenceCache
from .model import Qwen2Model

PREFILL_CHUNK_TOKENS = 32_768
"""Tokens of a prefill chunk: bounds the activations whatever the length of the prompt."""


@dataclass(frozen=True)
class Progress:
    """How far a prefill is. `eta` is None until something has been measured."""

    done: int  # tokens, a chunk's finished layers counted as their share of its tokens
    total: int  # tokens
    eta: float | None  # seconds to the end of the prefill
    elapsed: float  # seconds since its start


OnProgress = Callable[[Progress], None]
"""Called after every layer of every chunk. May raise: the prefill stops there."""

OnHidden = Callable[[int, Tensor], None]
"""Called with (position of the first row, hidden rows [n, hidden]) for requested rows."""


def prefill_flops(config: ModelConfig, begin: int, end: int) -> float:
    """Multiply-adds times two of the tokens [begin, end): linear layers plus causal attention."""
    layer = config.hidden_size * (config.q_size + 2 * config.kv_size + config.q_size)
    layer += 3 * config.hidden_size * config.intermediate_size
    pairs = (end - begin) * (end + begin + 1) / 2
    return 2.0 * config.num_layers * ((end - begin) * layer + 2 * config.q_size * pairs)


class _ProgressMeter:
    """ETA from the work left and the rate so far; work is counted in flops, not in tokens.

    Late chunks attend to more keys than early ones, so tokens per second fall all the way.
    """

    def __init__(self, config: ModelConfig, begin: int, total: int, report: OnProgress) -> None:
        self._config, self._begin, self._total, self._report = config, begin, total, report
        self._start = time.perf_counter()

    def update(self, chunk: tuple[int, int], share: float) -> None:
        begin, end = chunk
        flops = prefill_flops
        done = flops(self._config, self._begin, begin) + share * flops(self._config, begin, end)
        left = flops(self._config, self._begin, self._total) - done
        elapsed = time.perf_counter() - self._start
        tokens = begin + int(share * (end - begin))
        self._report(Progress(tokens, self._total, elapsed * left / done, elapsed))


def prefill(
    model: Qwen2Model,
    rotary: Rotary,
    cache: KVCache,
    sequence: SequenceCache,
    token_ids: Sequence[int],
    *,
    temperature: float,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    on_progress: OnProgress | None = None,
    on_hidden: OnHidden | None = None,
) -> Tensor:
    """Run the rest of a prompt through the model, from `sequence.length` on.

    Args:
        model: weights and workspace.
        rotary: positions.
        cache: the pool that `sequence` lives in.
        sequence: holds the keys and values of the tokens before; grows to the whole prompt.
        token_ids: the whole prompt.
        temperature: s(n) of the request, the same for every chunk.
        chunk_tokens: tokens per chunk, at most the workspace's.
        on_progress: see `Progress`.
        on_hidden: if given, receives the final hidden state of every new row, chunk by chunk.

    Returns:
        [1, hidden] final hidden state of the last prompt token.
    """
    total = len(token_ids)
    meter = _ProgressMeter(model.config, sequence.length, total, on_progress or (lambda _: None))
    hidden = torch.empty(0)
    while sequence.length < total:
        begin = sequence.length
        end = min(total, begin + chunk_tokens)
        span = TokenSpan.append(rotary, cache, sequence, end - begin, temperature)
        if on_hidden:
            rows = None
        else:
            rows = torch.tensor([end - begin - 1] if end == total else [], dtype=torch.int64)
        chunk = torch.tensor(token_ids[begin:end], dtype=torch.int64)
        try:
            hidden = model.forward(
                chunk,
                span,
                rows,
                lambda done, of: meter.update((begin, end), done / of),  # noqa: B023
            )
        except BaseException:
            sequence.truncate(begin)  # a cancelled chunk leaves no half-written tokens behind
            raise
        if on_hidden:
            on_hidden(begin, hidden)
    return hidden[-1:]
