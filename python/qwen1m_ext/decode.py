"""One decode step: the newest token goes through the model and yields the next logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Rotary, TokenSpan
from .kv_cache import KVCache, SequenceCache
from .model import Qwen2Model


def decode_step(
    model: Qwen2Model,
    rotary: Rotary,
    cache: KVCache,
    sequence: SequenceCache,
    token_id: int,
    temperature: float,
) -> Tensor:
    """Append one token to a sequence.

    Args:
        model: weights and workspace.
        rotary: positions.
        cache: the pool that `sequence` lives in.
        sequence: grows by one token.
        token_id: the token.
        temperature: s(n), n the larger of the prompt's and the current length.

    Returns:
        [vocab] float32 logits of the token that follows.
    """
    span = TokenSpan.append(rotary, cache, sequence, 1, temperature)
    hidden = model.forward(torch.tensor([token_id], dtype=torch.int64), span)
    return model.logits(hidden)[0]
