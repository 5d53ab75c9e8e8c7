"""Rows of a table."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding(weight: Tensor, token_ids: Tensor) -> Tensor:
    """[vocab, hidden] and [tokens] -> [tokens, hidden], the very bits."""
    rows = [weight[token] for token in token_ids.tolist()]
    return torch.stack(rows) if rows else weight[:0]
