"""Vertical-slash sparse prefill by its definition: scores, selection, key sets, masked softmax.

MInference (arXiv:2407.02490, section 3 and algorithm 4) with the Dual Chunk positions of the
Qwen2.5-1M report (arXiv:2501.15383, section 5.2). A segment [begin, end) of tokens lies in one Dual
Chunk; row i meets key j on the diagonal of offset o = i - j. Everything here is a dense mask or a
Python list; nothing is shared with the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.rope import rotate

FORCED_VERTICALS, FORCED_SLASHES = 30, 100


def stage_keys(token: int, segment_end: int, chunk_len: int) -> list[tuple[int, int]]:
    """Keys [begin, end) of the inter, successive and intra stage of a token's chunk."""
    intra = token // chunk_len * chunk_len
    successive = max(0, intra - chunk_len)
    return [(0, successive), (successive, intra), (intra, segment_end)]


def logits(
    q: Tensor,
    tokens: Tensor,
    k: Tensor,
    logit_scale: float,
    rope_table: Tensor,
    chunk_size: int,
    local_size: int,
    critical: bool = False,
) -> Tensor:
    """Logits of rows of one Dual Chunk against all keys: [q_heads, rows, keys] float64.

    A key after its row's token is -inf. `critical`: the positions of the selection, which grow by
    one from token to token (m + chunk_len, m + chunk_size) where attention's are clamped.
    """
    chunk_len = chunk_size - local_size
    m = tokens % chunk_len
    if critical:
        positions = [m + chunk_size, m + chunk_len, m]
    else:
        inter = torch.full_like(m, min(2 * chunk_len - 1, chunk_size))
        positions = [inter, (m + chunk_len).clamp(max=chunk_size), m]
    group = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(group, dim=1)
    parts = []
    for (begin, end), position in zip(
        stage_keys(int(tokens[0]), len(k), chunk_len), positions, strict=True
    ):
        if begin < end:
            rotated = rotate(q, rope_table[position][:, None])
            parts.append(torch.einsum("rhd,nhd->hrn", rotated, keys[begin:end]))
    result = logit_scale * torch.cat(parts, dim=-1)
    future = torch.arange(len(k)) > tokens[:, None]
    return result.masked_fill(future, -math.inf)


def estimate(q: Tensor, k: Tensor, *rules: float | Tensor | int | bool) -> tuple[Tensor, Tensor]:
    """Column sums by key and diagonal sums by offset, [q_heads, keys] float64 each.

    q: [n, q_heads, D], the last n tokens; k: [keys, kv_heads, D]; rules: as for `logits`.
    """
    end, rows = len(k), len(q)
    tokens = torch.arange(end - rows, end)
    p = logits(q, tokens, k, *rules).softmax(-1)  # type: ignore[arg-type]
    slash = torch.zeros(len(p), end, dtype=torch.float64)
    for row, token in enumerate(tokens.tolist()):
        slash[:, : token + 1] += p[:, row, : token + 1].flip(-1)
    return p.sum(1), slash


def select(score: Tensor, size: int, forced: int) -> list[int]:
    """Indices of the `size` largest, ascending; the first `forced` above all, ties to the lower."""
    values = score.tolist()
    values[:forced] = [math.inf] * min(forced, len(values))
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:size])


def evenly(begin: int, count: int) -> list[int]:
    """What an empty list receives under `fallback`; `count` keys in the stage."""
    return [begin + n * max(1, count // 5) for n in range(min(5, count))]


def merged(offsets: list[int], apart: int) -> list[tuple[int, int]]:
    """Offsets as runs [lo, hi); those with a gap below `apart` are one."""
    runs: list[tuple[int, int]] = []
    for offset in offsets:
        if runs and offset - runs[-1][1] < apart:
            runs[-1] = (runs[-1][0], offset + 1)
        else:
            runs.append((offset, offset + 1))
    return runs


def plan(
    vertical: Tensor,
    slash: Tensor,
    v_size: int,
    s_size: int,
    begin: int,
    chunk_len: int,
    tile_tokens: int,
    exact: bool = False,
    fallback: bool = False,
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """(verticals, runs) of one head, a list for each stage; vertical, slash: [segment_end]."""
    end = len(vertical)
    columns = select(vertical, v_size, FORCED_VERTICALS)
    offsets = select(slash, s_size, FORCED_SLASHES)
    verticals, runs = [], []
    for b, e in stage_keys(begin, end, chunk_len):
        mine = [key for key in columns if b <= key < e]
        meeting = [o for o in offsets if b < e and max(0, begin - e) <= o <= end - 1 - b]
        if fallback:
            mine = mine or evenly(b, e - b)
            meeting = meeting or evenly(max(0, begin - e), e - b)
        verticals.append(mine)
        runs.append(merged(meeting, 1 if exact else tile_tokens))
    return verticals, runs


def key_mask(
    verticals: list[list[int]],
    runs: list[list[tuple[int, int]]],
    begin: int,
    end: int,
    chunk_len: int,
    tile_tokens: int,
) -> Tensor:
    """The keys of each row of the segment: [end - begin, end] bool, causal."""
    mask = torch.zeros(end - begin, end, dtype=torch.bool)
    for stage, (b, e) in enumerate(stage_keys(begin, end, chunk_len)):
        mask[:, verticals[stage]] = True
        for first in range(begin, end, tile_tokens):
            last = min(first + tile_tokens, end) - 1
            for lo, hi in runs[stage]:
                # Key j = i - o of any row i of the tile and any offset o of the run.
                keys = slice(max(b, first - (hi - 1)), max(0, min(e, last - lo + 1)))
                mask[first - begin : last + 1 - begin, keys] = True
    return mask & (torch.arange(end) <= torch.arange(begin, end)[:, None])


def attention(
    mask: Tensor, q: Tensor, tokens: Tensor, k: Tensor, v: Tensor, *rules: float | Tensor | int
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys of the mask; rows without keys give 0 and -inf.

    mask: [q_heads, rows, keys]; q: [rows, q_heads, D]; k, v: [keys, kv_heads, D]; rules: as for
    `logits`. Returns float64 (out [rows, q_heads, D], lse [rows, q_heads]).
    """
    scores = logits(q, tokens, k, *rules).masked_fill(~mask, -math.inf)  # type: ignore[arg-type]
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp().nan_to_num(0.0)
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hrn,nhd->rhd", p, values), lse.T
