"""Causal attention with Dual Chunk Attention positions: one softmax, explicit pair positions.

Dual Chunk Attention (arXiv:2402.17463; Qwen2.5-1M report, arXiv:2501.15383, section 4.1) keeps
every relative position inside what the model was trained on. With chunk_len = chunk_size -
local_size, a key keeps its offset inside its chunk; the query takes a position that depends on
how many chunks lie between the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.rope import rotate


def query_positions(i: int, j: Tensor, chunk_size: int, local_size: int) -> Tensor:
    """Position at which query token i is rotated to meet the keys of tokens j [n], each."""
    chunk_len = chunk_size - local_size
    offset = i % chunk_len
    distance = i // chunk_len - j // chunk_len  # in chunks
    intra = offset
    successive = min(offset + chunk_len, chunk_size)
    inter = min(2 * chunk_len - 1, chunk_size)
    return torch.where(distance == 0, intra, torch.where(distance == 1, successive, inter))


def temperature(n: int, original_max: int) -> float:
    """s(n) of the YaRN scaling: the logits of a request of n tokens are multiplied by s^2."""
    return max(1.0, 0.1 * math.log(n / original_max) + 1.0) if original_max else 1.0


def attention(
    q: Tensor,
    tokens: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    rope_table: Tensor,
    chunk_size: int,
    local_size: int,
) -> tuple[Tensor, Tensor]:
    """Attend each query row to the keys at or before its token.

    Args:
        q: [rows, q_heads, D], un-rotated.
        tokens: [rows] absolute token index of each row.
        k: [keys, kv_heads, D], rotated at key token % chunk_len.
        v: [keys, kv_heads, D].
        logit_scale: [rows] multiplies the logits of a row; or one for all, [1].
        rope_table: [table rows, D/2, 2] (cos, sin).
        chunk_size, local_size: tokens; see the module.

    Returns:
        float64 (out [rows, q_heads, D], lse [rows, q_heads], natural log).
    """
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    k = k.double().repeat_interleave(group, dim=1)
    v = v.double().repeat_interleave(group, dim=1)
    scales = logit_scale.double().expand(len(tokens)).tolist()
    for row, token in enumerate(tokens.tolist()):
        keys = token + 1
        positions = query_positions(token, torch.arange(keys), chunk_size, local_size)
        logits = torch.empty(q.shape[1], keys, dtype=torch.float64)
        for position in positions.unique():  # at most three
            at = positions == position
            rotated = rotate(q[row], rope_table[position])
            logits[:, at] = scales[row] * torch.einsum("hd,nhd->hn", rotated, k[:keys][at])
        lse[row] = logits.logsumexp(-1)
        out[row] = torch.einsum("hn,nhd->hd", logits.softmax(-1), v[:keys])
    return out, lse
