"""Vertical-slash sparse prefill: windows, selection, attention over what was selected, recall.

A prompt is cut into windows; the last rows of a window choose, per query head, the columns (keys)
and diagonals (distances) that all rows of the window attend to. See docs/sparsity.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from . import ops
from .config import DualChunkConfig, ModelConfig
from .device import CPU, Device, StreamDevice
from .sparse_config import DILATION, WINDOW_TOKENS, SparseConfig, SparseSettings
from .sparse_tiles import GPU_TILES, choose_tile, tile_cost

SELECTING_ROWS = 64
"""The last rows of a window that choose for all of it (MInference and Qwen2.5-1M)."""

RECALL_ROWS = 8
"""Rows per window and layer whose recall is measured at run time: an eighth of the selection's
own work."""


@dataclass(frozen=True)
class Stored:
    """One layer of a sequence in the cache, and the chunk of new tokens that meets it."""

    begin: int  # position of the chunk's first token; its keys and values are cached too
    k_cache: Tensor  # [pages, kv_heads, 128, D]
    v_cache: Tensor
    block_table: Tensor  # [1, pages] int32
    logit_scale: Tensor  # [1] float32
    rope_table: Tensor  # [rows, D/2, 2] float32


@dataclass(frozen=True)
class Selection:
    """What the rows of a window attend to, as lists of include/qwen1m/sparse_plan.h."""

    end: int  # of the window
    verticals: Tensor  # [q_heads, capacity] int32 ascending, then the largest int32
    runs: Tensor  # [q_heads, 3, capacity, 2] int32: offsets [lo, hi), for every stage the same
    run_count: Tensor  # [q_heads, 3] int32
    tile_tokens: int  # that the runs were planned for

    def lists(self, begin: int, end: int, chunk_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """(vertical_count, runs, run_count) of a segment of the window: what lies before its end.

        The counts are [q_heads, 3] int32.
        """
        intra = begin // chunk_len * chunk_len
        borders = max(0, intra - chunk_len), intra, end  # numbers: no copy that a queue waits for
        below = torch.stack([(self.verticals < border).sum(1) for border in borders], 1)
        vertical_count = torch.diff(below, prepend=torch.zeros_like(below[:, :1])).int()
        if end == self.end:
            return vertical_count, self.runs, self.run_count
        used = self._numbers() < self.run_count[..., None]
        run_count = (used & (self.runs[..., 0] < end)).sum(2).int()
        return vertical_count, self.runs.clamp(max=end), run_count

    def columns(self) -> Tensor:
        """Keys that a full tile loads far from the prompt's beginning, per head: [q_heads] float64.

        A tile at the window's end loads no more, and no more than the window's end. An upper bound:
        columns inside a run are counted twice.
        """
        used = self._numbers() < self.run_count[:, :1]
        length = (self.runs[:, 0, :, 1] - self.runs[:, 0, :, 0]).double() + self.tile_tokens - 1
        columns = (self.verticals < self.end).sum(1)
        return (length * used).sum(1) + columns

    def _numbers(self) -> Tensor:
        """Of the places for runs: [capacity]."""
        return torch.arange(self.runs.shape[2], device=self.runs.device)


class WindowGrid:
    """Where windows and segments end.

    Windows end at multiples of `window_tokens`, and at the borders of DCA chunks that are at least
    that long. Segments are windows cut at every DCA border: the rows of a segment lie in one chunk.
    (As published a window is a segment; models with short chunks, such as the demo, would spend
    more on selecting than on attending.)
    """

    def __init__(self, dual_chunk: DualChunkConfig, window_tokens: int = WINDOW_TOKENS) -> None:
        self.window_tokens = window_tokens
        self.chunk_len = dual_chunk.chunk_len
        self.border = self.chunk_len if self.chunk_len >= window_tokens else None

    def window_end(self, begin: int) -> int:
        """End of the window that holds token `begin`."""
        end = (begin // self.window_tokens + 1) * self.window_tokens
        if self.border:
            end = min(end, (begin // self.border + 1) * self.border)
        return end

    def windows(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The windows of tokens [begin, end).

        The rows that select lie in one DCA chunk: a few rows beyond a border are a window alone.
        """
        while begin < end:
            border = min(end, self.window_end(begin))
            last_chunk = (border - 1) // self.chunk_len * self.chunk_len
            if begin < last_chunk and border - last_chunk < SELECTING_ROWS:
                yield begin, last_chunk
                begin = last_chunk
            yield begin, border
            begin = border

    def segments(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The segments of a window."""
        while begin < end:
            border = min(end, (begin // self.chunk_len + 1) * self.chunk_len)
            yield begin, border
            begin = border


class RecallMeter:
    """Attention recall exp(lse_sparse - lse_full): the softmax mass that the selected keys hold."""

    def __init__(self, num_layers: int, num_q_heads: int, device: Device = CPU) -> None:
        self.total = torch.zeros(num_layers, num_q_heads, dtype=torch.float64, device=device.where)
        self.rows = torch.zeros(num_layers, dtype=torch.int64)

    def add(self, layer: int, recall: Tensor) -> None:
        """Take in [rows, q_heads] recalls of one layer."""
        self.total[layer] += recall.double().sum(0)
        self.rows[layer] += len(recall)

    def heads(self) -> Tensor:
        """[layers, q_heads] mean recall; NaN where nothing was measured."""
        return self.total.cpu() / self.rows[:, None]

    @property
    def mean(self) -> float | None:
        """Mean over all measured rows and heads; None without any."""
        if not self.rows.any():
            return None
        return float(self.total.sum()) / float(self.rows.sum() * self.total.shape[1])


class SparseAttention:
    """Budgets, switches and scratch of an engine's sparse prefill, shared by its requests."""

    def __init__(
        self,
        config: ModelConfig,
        dual_chunk: DualChunkConfig,
        budgets: SparseConfig,
        max_tokens: int,
        settings: SparseSettings = SparseSettings(),  # noqa: B008 - frozen
        device: Device = CPU,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Reserve the scores of `max_tokens` keys; on a GPU also what its kernel gathers.

        See `score_bytes` and `gather_bytes`; `dtype` is that of keys and values.
        """
        self.config, self.dual_chunk, self.settings = config, dual_chunk, settings
        self.device = device
        self.grid = WindowGrid(dual_chunk, settings.window_tokens)
        self.v_size = torch.tensor([[b.columns for b in layer] for layer in budgets.layers])
        self.s_size = torch.tensor([[b.slash_size for b in layer] for layer in budgets.layers])
        heads = config.num_q_heads
        self._vertical = torch.empty(heads, max_tokens, device=device.where)
        self._slash = torch.empty(heads, max_tokens, device=device.where)
        self._gathered: Tensor | None = None
        if isinstance(device, StreamDevice):
            size = gather_bytes(config, dtype, max_tokens, int(self.v_size.max()))
            self._gathered = torch.empty(size // dtype.itemsize, dtype=dtype, device=device.where)
        self.choose_tile = self._slash.is_cuda
        self.num_computed_layers = config.num_layers - 1  # of the last one only requested rows

    def attend(
        self, layer: int, stored: Stored, q: Tensor, out: Tensor, meter: RecallMeter
    ) -> None:
        """Attention of a prefill chunk's rows in one layer; q and out: [tokens, q_heads, D]."""
        first = stored.begin
        for begin, end in self.grid.windows(first, first + len(q)):
            rows = slice(begin - first, end - first)
            self._attend_window(layer, stored, begin, q[rows], out[rows], meter)

    def _attend_window(
        self, layer: int, stored: Stored, begin: int, q: Tensor, out: Tensor, meter: RecallMeter
    ) -> None:
        """The same for the rows of one window, which begins at token `begin`."""
        end = begin + len(q)
        self.estimate(stored, q, end)
        sampled = begin + pseudo_random(begin, layer) % max(1, len(q) - RECALL_ROWS)
        selection = self.select(end, self.v_size[layer], self.s_size[layer])
        for segment in self.grid.segments(begin, end):
            rows = slice(segment[0] - begin, segment[1] - begin)
            self.apply(stored, selection, segment, segment[0], q[rows], out[rows], None)
            if segment[0] <= sampled < segment[1]:
                count = min(RECALL_ROWS, segment[1] - sampled)
                some = q[sampled - begin : sampled - begin + count]
                meter.add(layer, self.recall(stored, selection, segment, sampled, some))

    def estimate(self, stored: Stored, q: Tensor, end: int) -> None:
        """Score every column and diagonal by the last of these rows, the last being end - 1."""
        dca = self.dual_chunk
        in_chunk = (end - 1) % self.grid.chunk_len + 1  # the rows that select lie in one DCA chunk
        n = min(SELECTING_ROWS, len(q), in_chunk)
        ops.sparse_estimate(
            self._vertical[:, :end],
            self._slash[:, :end],
            q[-n:],
            stored.k_cache,
            stored.block_table,
            stored.logit_scale,
            stored.rope_table,
            end,
            dca.chunk_size,
            dca.local_size,
            self.settings.positions == "critical",
        )

    def select(self, end: int, v_size: Tensor, s_size: Tensor) -> Selection:
        """Choose the best columns and diagonals of a window by the scores of `estimate`.

        The plan is made as if there were one stage: attention cuts its ranges at every stage's
        borders anyway, so one list of runs serves all segments of the window, and of the columns
        only how many lie in each stage is a segment's own.

        On a GPU (`choose_tile`) the tile may become larger than the setting if that is faster by
        the lengths of the runs; it never becomes smaller, which would cost recall.
        """
        selection = self._plan(end, v_size, s_size, self.settings.tile_tokens)
        tiles = [tile for tile in GPU_TILES if tile >= selection.tile_tokens]
        if not self.choose_tile or not tiles:
            return selection
        runs, run_count = selection.runs[:, -1], selection.run_count[:, -1]
        columns, dim = (selection.verticals < end).sum(1), self.config.head_dim
        costs = [tile_cost(tile, runs, run_count, columns, end, dim) for tile in tiles]
        tile = choose_tile(costs).tile_tokens
        if tile == selection.tile_tokens:
            return selection
        return self._plan(end, v_size, s_size, tile)

    def _plan(self, end: int, v_size: Tensor, s_size: Tensor, tile: int) -> Selection:
        """`select` for a given tile."""
        heads = self.config.num_q_heads
        columns = ops.sparse_vertical_capacity(int(v_size.max()), end)
        runs = ops.sparse_run_capacity(int(s_size.max()), end, tile)
        like: dict[str, Any] = {"dtype": torch.int32, "device": self._slash.device}
        verticals = torch.full((heads, columns), torch.iinfo(torch.int32).max, **like)
        vertical_count = torch.empty(heads, ops.SPARSE_STAGES, **like)
        staged = torch.empty(heads, ops.SPARSE_STAGES, runs, 2, **like)
        run_count = torch.empty_like(vertical_count)
        group = heads // self.config.num_kv_heads if self.settings.share_group else 1
        ops.sparse_plan(
            verticals,
            vertical_count,
            staged,
            run_count,
            self._vertical[:, :end],
            self._slash[:, :end],
            self.device.put(v_size),
            self.device.put(s_size),
            0,
            ops.INFINITE_CHUNK,
            0,
            tile,
            group,
        )
        shape = staged.shape
        return Selection(
            end,
            verticals,
            staged[:, -1:].expand(shape).contiguous(),
            run_count[:, -1:].expand(run_count.shape).contiguous(),
            tile,
        )

    def apply(
        self,
        stored: Stored,
        selection: Selection,
        segment: tuple[int, int],
        q_begin: int,
        q: Tensor,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """Attention of rows of a segment, from token q_begin on, over its window's selection."""
        vertical_count, runs, run_count = selection.lists(*segment, self.grid.chunk_len)
        ops.sparse_prefill(
            out,
            lse,
            q,
            stored.k_cache,
            stored.v_cache,
            stored.block_table,
            stored.logit_scale,
            stored.rope_table,
            selection.verticals,
            vertical_count,
            runs,
            run_count,
            self._scratch(selection.verticals.shape[1]),
            q_begin,
            *segment,
            self.dual_chunk.chunk_size,
            self.dual_chunk.local_size,
            selection.tile_tokens,
        )

    def _scratch(self, capacity: int) -> Tensor | None:
        """Where a GPU gathers the keys and values of the columns of a plan."""
        if self._gathered is None:
            return None
        shape = (2, self.config.num_q_heads, capacity + 1, self.config.head_dim)
        return self._gathered[: math.prod(shape)].view(shape)

    def recall(
        self,
        stored: Stored,
        selection: Selection,
        segment: tuple[int, int],
        q_begin: int,
        q: Tensor,
    ) -> Tensor:
        """[rows, q_heads] recall of some rows of a segment: dense work for these rows."""
        out = torch.empty_like(q)
        sparse = torch.empty(q.shape[:2], device=q.device)
        self.apply(stored, selection, segment, q_begin, q, out, sparse)
        return (sparse - self.full_lse(stored, q_begin, q)).exp()

    def full_lse(self, stored: Stored, q_begin: int, q: Tensor) -> Tensor:
        """[rows, q_heads] log of the softmax denominator over all keys, for consecutive rows."""
        lse = torch.empty(q.shape[:2], device=q.device)
        ops.prefill_attention(
            torch.empty_like(q),
            lse,
            q,
            stored.k_cache,
            stored.v_cache,
            stored.block_table,
            self.device.put(torch.tensor([0, len(q)])),
            self.device.put(torch.tensor([q_begin + len(q)])),
            stored.logit_scale,
            stored.rope_table,
            self.dual_chunk.chunk_size,
            self.dual_chunk.local_size,
        )
        return lse

    @property
    def mean_columns(self) -> float:
        """Keys per row and head, roughly: `DILATION` stands for runs that are not known yet."""
        return float((self.v_size + DILATION * self.s_size).double().mean())

    @property
    def key(self) -> str:
        """Everything that cached keys and values depend on besides what dense ones do."""
        facts = repr((self.settings, self.v_size.tolist(), self.s_size.tolist()))
        facts += " tiles by runs" if self.choose_tile else ""
        return f"sparse {blake2b(facts.encode(), digest_size=16).hexdigest()}"


def score_bytes(config: ModelConfig, max_tokens: int) -> int:
    """Bytes of a `SparseAttention`: the scores of every key and distance, float32, per query head.

    Plans come on top: 4 bytes per selected column and 24 per run, below 2 MiB for the published
    budgets.
    """
    return 2 * 4 * config.num_q_heads * max_tokens


def gather_bytes(config: ModelConfig, dtype: torch.dtype, max_tokens: int, columns: int) -> int:
    """Bytes that the GPU kernel gathers into, for budgets of up to `columns` columns."""
    rows = ops.sparse_vertical_capacity(columns, max_tokens) + 1
    return 2 * config.num_q_heads * rows * config.head_dim * dtype.itemsize


def pseudo_random(*values: int) -> int:
    """The same for the same values on every machine: results are reproducible."""
    state = 0
    for value in values:
        state = (state ^ (value + 0x9E3779B9)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        state ^= state >> 31
    return state


@dataclass
class SparsePrefill:
    """The sparse prefill of one request: what its segments carry through the model."""

    attention: SparseAttention
    meter: RecallMeter

    @staticmethod
    def start(attention: SparseAttention) -> SparsePrefill:
        """Begin a request."""
        config = attention.config
        with attention.device.scope():  # on the caller's thread, before the steps that add to it
            meter = RecallMeter(config.num_layers, config.num_q_heads, attention.device)
        return SparsePrefill(attention, meter)

    def covers(self, layer: int) -> bool:
        """Whether a layer's attention is sparse.

        In the last one only the rows that somebody asked for are computed. They are dense, and so
        are all of them when all are asked for: the answer does not depend on the question.
        """
        return layer < self.attention.num_computed_layers

    def attend(self, layer: int, stored: Stored, q: Tensor, out: Tensor) -> None:
        """Attention of a chunk in one layer; q and out: [tokens, q_heads, D]."""
        self.attention.attend(layer, stored, q, out, self.meter)
