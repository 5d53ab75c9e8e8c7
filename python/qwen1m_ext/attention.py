"""What attention needs to know besides the tensors: positions, rotary table, temperature, pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .config import DualChunkConfig, ModelConfig
from .device import CPU, Device
from .kv_cache import KVCache, SequenceCache, pages_for
from .sparsity import SparsePrefill, Stored


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
    def build(
        config: ModelConfig,
        dual_chunk: DualChunkConfig,
        max_tokens: int,
        *,
        critical: bool = False,
        device: Device = CPU,
    ) -> Rotary:
        """Build the table for sequences of up to `max_tokens` tokens.

        `critical`: with the positions that only the selection of sparse prefill uses.
        """
        rows = dual_chunk.table_rows(max_tokens, critical)
        table = build_rope_table(config.rope_theta, config.head_dim, rows)
        return Rotary(dual_chunk, table.to(device.where), config.head_dim)

    def logit_scale(self, temperature: float) -> float:
        """s^2 / sqrt(D): what multiplies q k^T under the temperature s."""
        return temperature**2 / math.sqrt(self.head_dim)


@dataclass(frozen=True)
class Segment:
    """Consecutive new tokens [begin, end) of one sequence."""

    sequence: SequenceCache
    begin: int
    end: int
    temperature: float  # s of all of them, or of the first
    sparse: SparsePrefill | None = None  # None: dense
    few: tuple[float, ...] = ()  # s of each, if they go through the op for few rows

    def temperatures(self, begin: int, end: int) -> tuple[float, ...]:
        """Those of the tokens [begin, end), one each."""
        return self.few[begin - self.begin : end - self.begin] or (self.temperature,) * (
            end - begin
        )


@dataclass(frozen=True)
class _Call:
    """Arguments of the attention ops: leading runs of few rows, then runs of many.

    The tensors are on the device.
    """

    groups: list[tuple[int, int]]  # (runs, rows of each), for decode_attention
    cu_q: Tensor  # [runs + 1] int64, of the rows after those
    block_table: Tensor  # [all runs, pages] int32
    kv_len: Tensor  # [all runs] int64
    logit_scale: Tensor  # float32: of each of the few rows, then of each run of many
    pages: Tensor  # int64: those that the runs of many rows read


@dataclass(frozen=True)
class _Part:
    """Rows [begin, end) of a batch that attend together."""

    begin: int
    end: int
    call: _Call
    segment: int  # the last of the part, the only one of a sparse part
    sparse: SparsePrefill | None


class Batch:
    """Segments on their way through the model together, their rows one after the other.

    Put segments of one token and of few rows first, by their length: those of one length share a
    call of the op for few rows. Two segments may belong to one sequence, in order: keys and values
    of all rows are written before any is read.
    """

    def __init__(self, rotary: Rotary, cache: KVCache, segments: Sequence[Segment]) -> None:
        """The sequences have room for their tokens already."""
        self._rotary, self._cache, self._segments = rotary, cache, segments
        self.put = cache.device.put
        self._first = [0]  # row of each segment, and their number
        for s in segments:
            self._first.append(self._first[-1] + s.end - s.begin)
        none = torch.arange(0)
        positions = [torch.arange(s.begin, s.end) for s in segments]
        slots = [s.sequence.slots(s.begin, s.end) for s in segments]
        self.positions = self.put(torch.cat([none, *positions]))
        self._slots = self.put(torch.cat([none, *slots]))
        self._every_row = self._call([(i, s.begin, s.end) for i, s in enumerate(segments)])
        self._some_rows: tuple[Tensor, _Call] | None = None
        self._stored: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._parts = self._cut() if any(s.sparse for s in segments) else []

    @staticmethod
    def of_decodes(
        rotary: Rotary,
        cache: KVCache,
        positions: Tensor,
        slots: Tensor,
        kv_len: Tensor,
        logit_scale: Tensor,
        block_table: Tensor,
    ) -> Batch:
        """The t newest tokens of each of n sequences, described by tensors whose values may change.

        On the device: positions, slots: [n t] int64; logit_scale: [n t] float32; kv_len: [n] int64;
        block_table: [n, pages] int32. A sequence of kv_len 0 and slots -1 is nobody's; where kv_len
        is more than 0, it is at least t.
        """
        batch = Batch(rotary, cache, [])
        rows, n = len(positions), len(kv_len)
        batch._first, batch.positions, batch._slots = [rows], positions, slots
        none = positions[:0]
        groups = [(n, rows // n)]
        batch._every_row = _Call(groups, none, block_table, kv_len, logit_scale, none)
        return batch

    def __len__(self) -> int:
        """Number of rows."""
        return self._first[-1]

    def in_cache(self) -> AbstractContextManager[None]:
        """Around the forward pass of this batch; see `KVCache.step`."""
        return self._cache.step([(s.sequence, s.begin, s.end) for s in self._segments])

    def append_kv(self, layer: int, q: Tensor, qkv: Tensor, bias: Tensor, rows: slice) -> None:
        """Bias, rotation and cache write for some rows; q: [rows, q_heads, D] is written."""
        ops.qkv_rope_append(
            q,
            *self._cache.layer(layer),
            qkv,
            bias,
            self.positions[rows],
            self._slots[rows],
            self._rotary.table,
            self._rotary.dual_chunk.chunk_len,
            *self._cache.scales(layer),
        )

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Attention of all rows; q and out: [rows, q_heads, D]."""
        for part in self._parts:
            rows = slice(part.begin, part.end)
            if part.sparse and part.sparse.covers(layer):
                part.sparse.attend(layer, self.stored(layer, part.segment), q[rows], out[rows])
            else:
                self._run(part.call, layer, q[rows], out[rows])
        if not self._parts:
            self._run(self._every_row, layer, q, out)
        self._cache.release(layer)

    def attend_rows(self, layer: int, q: Tensor, out: Tensor, rows: Tensor) -> None:
        """Attention of chosen rows, ascending; q and out: [len(rows), q_heads, D].

        rows: on the host.
        """
        if self._some_rows is None or self._some_rows[0] is not rows:
            self._some_rows = rows, self._call(self._runs(rows.tolist()))
        self._run(self._some_rows[1], layer, q, out)
        self._cache.release(layer)

    def stored(self, layer: int, segment: int) -> Stored:
        """What is cached of a segment's sequence, and how its queries meet it."""
        s = self._segments[segment]
        if segment not in self._stored:  # the same for all layers
            scale = torch.tensor([self._rotary.logit_scale(s.temperature)], dtype=torch.float32)
            block_table = self.put(s.sequence.block_table[:, : pages_for(s.end)])
            self._stored[segment] = block_table, block_table[0].long(), self.put(scale)
        block_table, pages, logit_scale = self._stored[segment]
        k, v = self._cache.widened(layer, pages)
        return Stored(s.begin, k, v, block_table, logit_scale, self._rotary.table)

    def _cut(self) -> list[_Part]:
        """Every sparse segment on its own, and what lies between them."""
        parts: list[_Part] = []
        first = 0
        for i, segment in enumerate(self._segments):
            last = i + 1 == len(self._segments)
            if segment.sparse or last or self._segments[i + 1].sparse:
                runs = [(j, *self._bounds(j)) for j in range(first, i + 1)]
                rows = self._first[first], self._first[i + 1]
                parts.append(_Part(*rows, self._call(runs), i, segment.sparse))
                first = i + 1
        return parts

    def _bounds(self, segment: int) -> tuple[int, int]:
        return self._segments[segment].begin, self._segments[segment].end

    def _runs(self, rows: list[int]) -> list[tuple[int, int, int]]:
        """(segment, begin, end) of neighbouring rows: each run is a sequence of its own."""
        runs: list[tuple[int, int, int]] = []
        segment = 0
        for row in rows:
            while row >= self._first[segment + 1]:
                segment += 1
            position = self._segments[segment].begin + row - self._first[segment]
            if runs and runs[-1][0] == segment and runs[-1][2] == position:
                runs[-1] = segment, runs[-1][1], position + 1
            else:
                runs.append((segment, position, position + 1))
        return runs

    def _call(self, runs: list[tuple[int, int, int]]) -> _Call:
        groups: list[tuple[int, int]] = []
        temperatures: list[float] = []
        few = 0  # leading runs
        for segment, begin, end in runs:
            if end - begin > 1 and not self._segments[segment].few:
                break
            count, rows = groups.pop() if groups and groups[-1][1] == end - begin else (0, 0)
            groups.append((count + 1, rows or end - begin))
            temperatures += self._segments[segment].temperatures(begin, end)
            few += 1
        temperatures += [self._segments[i].temperature for i, _, _ in runs[few:]]
        lengths = [0] + [end - begin for _, begin, end in runs[few:]]
        kv_len = torch.tensor([end for _, _, end in runs], dtype=torch.int64)
        pages = pages_for(max((end for _, _, end in runs), default=0))
        table_rows = torch.tensor([self._segments[i].sequence.row for i, _, _ in runs])
        scales = [self._rotary.logit_scale(s) for s in temperatures]
        block_table = self._cache.block_table[:, :pages].index_select(0, table_rows.long())
        pages_read = _pages_of(block_table[few:], [end for _, _, end in runs[few:]])
        return _Call(
            groups,
            self.put(torch.tensor(lengths).cumsum(0)),
            self.put(block_table),
            self.put(kv_len),
            self.put(torch.tensor(scales, dtype=torch.float32)),
            self.put(pages_read),
        )

    def _run(self, call: _Call, layer: int, q: Tensor, out: Tensor) -> None:
        dca, cache = self._rotary.dual_chunk, self._cache
        k, v = cache.layer(layer)
        common = self._rotary.table, dca.chunk_size, dca.local_size
        run = row = 0
        for count, tokens in _calls(call.groups, cache.decode_rows):
            rows, runs = slice(row, row + count * tokens), slice(run, run + count)
            shape = (count, tokens, *q.shape[1:])
            scale = call.logit_scale[rows].view(count, tokens)
            ops.decode_attention(
                out[rows].view(shape), None, q[rows].view(shape), k, v,
                call.block_table[runs], call.kv_len[runs], scale, *common,
                cache.decode_scratch, *cache.scales(layer),
            )  # fmt: skip
            run, row = runs.stop, rows.stop
        if run < len(call.kv_len):
            k, v = cache.widened(layer, call.pages)
            ops.prefill_attention(
                out[row:], None, q[row:], k, v, call.block_table[run:], call.cu_q,
                call.kv_len[run:], call.logit_scale[row:], *common,
            )  # fmt: skip


def decode_scratch_bytes(
    config: ModelConfig, dual_chunk: DualChunkConfig, rows: int, pages: int, num_sms: int
) -> int:
    """Bytes of the scratch of `decode_attention` for so many rows, of one token or several."""
    return ops.decode_attention_scratch_bytes(
        (rows, 1, config.num_q_heads, config.head_dim),
        config.num_kv_heads,
        pages,
        dual_chunk.chunk_size,
        dual_chunk.local_size,
        num_sms,
    )


def reserve_decode_scratch(
    rotary: Rotary, cache: KVCache, q: Tensor, num_sms: int | None = None
) -> None:
    """Give a cache the scratch of `decode_attention` on a GPU, so that no step allocates it.

    Args:
        rotary: positions.
        cache: where it is kept.
        q: [sequences, rows of each, q_heads, head_dim], the largest call there will be.
        num_sms: multiprocessors; None: those of q's GPU.
    """
    dca = rotary.dual_chunk
    cache.decode_rows = len(q)
    cache.decode_scratch = ops.decode_attention_scratch(
        q, cache.k[0], cache.block_table, dca.chunk_size, dca.local_size, num_sms
    )


def _calls(groups: list[tuple[int, int]], most: int | None) -> Iterator[tuple[int, int]]:
    """Groups of runs, none with more than `most` rows, for which there is scratch."""
    for count, rows in groups:
        step = count if most is None else max(1, most // rows)
        for begin in range(0, count, step):
            yield min(step, count - begin), rows


def _pages_of(block_table: Tensor, ends: list[int]) -> Tensor:
    """The pages, each once, that hold the first tokens of some sequences."""
    pages: set[int] = set()
    for row, end in zip(block_table.tolist(), ends, strict=True):
        pages.update(row[: pages_for(end)])
    return torch.tensor(sorted(pages), dtype=torch.int64)
