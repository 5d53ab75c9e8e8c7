"""What attention needs to know besides the tensors: positions, rotary table, temperature, pages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .config import DualChunkConfig, ModelConfig
from .kv_cache import KVCache, SequenceCache


def build_rope_table(theta: float, head_dim: int, rows: int) -> Tensor:
    """(cos, sin) of every position: [rows, head_dim / 2, 2] float32.

    The phase is float32(position) * float32(theta ** (-2 i / head_dim)), as the models were
    trained and as every public implementation forms it; cosine and sine of that phase are then
    exact to float32. (At position 262,144 the rounding of the phase is 0.009 rad: a table from
    exact phases would be a different model.)
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (theta**exponent)
    table = torch.empty(rows, head_dim // 2, 2, dtype=torch.float32)
    for begin in range(0, rows, 1 << 16):  # blocks keep the float64 scratch small
        end = min(rows, begin + (1 << 16))
        positions = torch.arange(begin, end, dtype=torch.float32)
        phase = (positions[:, None] * inv_freq).double()
        table[begin:end, :, 0] = phase.cos()
        table[begin:end, :, 1] = phase.sin()
    return table


@dataclass(frozen=True)
class Rotary:
    """Position rules of a model and their rotary table, shared by all layers and requests."""

    dual_chunk: DualChunkConfig
    table: Tensor  # [rows, head_dim / 2, 2] float32
    head_dim: int

    @staticmethod
    def build(config: ModelConfig, dual_chunk: DualChunkConfig, max_tokens: int) -> Rotary:
        """Build the table for sequences of up to `max_tokens` tokens."""
        rows = dual_chunk.table_rows(max_tokens)
        table = build_rope_table(config.rope_theta, config.head_dim, rows)
        return Rotary(dual_chunk, table, config.head_dim)

    def logit_scale(self, temperature: float) -> float:
        """s^2 / sqrt(D): what multiplies q k^T under the temperature s."""
        return temperature**2 / math.sqrt(self.head_dim)


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive new tokens of one sequence, on their way through the model."""

    rotary: Rotary
    cache: KVCache
    positions: Tensor  # [tokens] int64
    slots: Tensor  # [tokens] int64
    block_table: Tensor  # [1, max_pages] int32
    logit_scale: Tensor  # [1] float32

    @staticmethod
    def append(
        rotary: Rotary, cache: KVCache, sequence: SequenceCache, count: int, temperature: float
    ) -> TokenSpan:
        """Make room for the next `count` tokens of a sequence, to be computed under s."""
        begin = sequence.length
        slots = sequence.append(count)
        return TokenSpan(
            rotary,
            cache,
            torch.arange(begin, begin + count),
            slots,
            sequence.block_table,
            torch.tensor([rotary.logit_scale(temperature)], dtype=torch.float32),
        )

    def __len__(self) -> int:
        """Number of tokens."""
        return self.positions.numel()

    def append_kv(self, layer: int, q: Tensor, qkv: Tensor, bias: Tensor, rows: slice) -> None:
        """Bias, rotation and cache write for some rows; q: [rows, q_heads, D] is written."""
        ops.qkv_rope_append(
            q,
            self.cache.k[layer],
            self.cache.v[layer],
            qkv,
            bias,
            self.positions[rows],
            self.slots[rows],
            self.rotary.table,
            self.rotary.dual_chunk.chunk_len,
        )

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Attention of all rows; q and out: [tokens, q_heads, D]."""
        end = self.positions[-1:] + 1
        if len(self) == 1:
            self._decode(layer, q, out, end)
        else:
            cu_q = torch.tensor([0, len(self)])
            self._prefill(layer, q, out, cu_q, end)

    def attend_rows(self, layer: int, q: Tensor, out: Tensor, rows: Tensor) -> None:
        """Attention of chosen rows, ascending; q and out: [len(rows), q_heads, D].

        Each run of neighbouring rows is a sequence of its own over the same pages.
        """
        starts = torch.ones(len(rows), dtype=torch.bool)
        starts[1:] = rows[1:] != rows[:-1] + 1
        first = starts.nonzero()[:, 0]
        cu_q = torch.cat([first, torch.tensor([len(rows)])])
        ends = self.positions[rows[cu_q[1:] - 1]] + 1
        if len(rows) == 1:
            self._decode(layer, q, out, ends)
        else:
            self._prefill(layer, q, out, cu_q, ends)

    def _prefill(self, layer: int, q: Tensor, out: Tensor, cu_q: Tensor, kv_len: Tensor) -> None:
        batch = kv_len.numel()
        dca = self.rotary.dual_chunk
        ops.prefill_attention(
            out,
            None,
            q,
            self.cache.k[layer],
            self.cache.v[layer],
            self.block_table.expand(batch, -1),
            cu_q,
            kv_len,
            self.logit_scale.expand(batch).contiguous(),
            self.rotary.table,
            dca.chunk_size,
            dca.local_size,
        )

    def _decode(self, layer: int, q: Tensor, out: Tensor, kv_len: Tensor) -> None:
        dca = self.rotary.dual_chunk
        ops.decode_attention(
            out[None],
            None,
            q[None],
            self.cache.k[layer],
            self.cache.v[layer],
            self.block_table,
            kv_len,
            self.logit_scale,
            self.rotary.table,
            dca.chunk_size,
            dca.local_size,
        )
