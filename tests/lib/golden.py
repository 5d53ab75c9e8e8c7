"""Golden vectors: the files of tests/golden, their inputs, and prompts through our append."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.cases import PagedCache
from lib.generator import tensor
from qwen1m_ext import ops
from qwen1m_ext.attention import build_rope_table
from reference.attention import temperature

FOLDER = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    """One file: its parameters, its arrays and the generated inputs."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> Tensor:
        """An array of the file."""
        return torch.from_numpy(self.arrays[name])

    def qkv(self, seed_q: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Generated q [T, H, D], k and v [T, KV, D], before any rotation."""
        m = self.meta
        q = tensor(seed_q, tokens, m["H"], m["D"]) * np.float32(m["q_amp"])
        k, v = (tensor(seed_q + n, tokens, m["KV"], m["D"]) for n in (1, 2))
        return q, k, v


def load(name: str) -> Golden:
    """Read golden/<name>.npz."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    return Golden(json.loads(bytes(arrays.pop("meta", b"{}"))), arrays)


@dataclass(frozen=True)
class Rules:
    """The position rules of one run. `right_rules` are right; a sensitivity test breaks one."""

    chunk_size: int
    local_size: int
    key_table: Tensor  # [rows, D/2, 2]
    query_table: Tensor
    logit_scale: float
    key_shift: int = 0  # added to the position of every key


def right_rules(meta: dict[str, Any], total: int) -> Rules:
    """What a file's parameters say for a request of `total` tokens."""
    table = build_rope_table(meta["rope_theta"], meta["D"], meta["chunk_size"] + 1)
    s = temperature(total, meta["original_max_position_embeddings"])
    scale = s * s * meta["softmax_scale"]
    return Rules(meta["chunk_size"], meta["local_size"], table, table, scale)


def append(
    rules: Rules, q: Tensor, k: Tensor, v: Tensor, cache: PagedCache, sequence: int, tokens: range
) -> Tensor:
    """Run qkv_rope_append for some tokens of a sequence; returns the op's q."""
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    out = torch.empty_like(q)
    ops.qkv_rope_append(
        out,
        cache.k_cache,
        cache.v_cache,
        qkv,
        None,
        torch.arange(tokens.start, tokens.stop) + rules.key_shift,
        cache.slots(sequence, tokens),
        rules.key_table,
        rules.chunk_size - rules.local_size,
    )
    return out
